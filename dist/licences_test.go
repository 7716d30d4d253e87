package dist_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Every module that is linked into the programs has a permissive licence, which a static binary may carry beside
// Apache-2.0.
func TestLicences(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Dir}}{{end}}{{end}}",
		"../cmd/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	permissive := []string{
		"Apache License Version 2.0", "Permission is hereby granted, free of charge", // MIT
		"Redistribution and use in source and binary forms",                // BSD
		"Permission to use, copy, modify, and/or distribute this software", // ISC
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		module, dir, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || seen[module] {
			continue
		}
		seen[module] = true
		files, _ := filepath.Glob(filepath.Join(dir, "[LC][IO][CP][EY][NI]*")) // LICENSE, LICENCE, COPYING
		known := false
		for _, f := range files {
			raw, err := os.ReadFile(f)
			text := strings.Join(strings.Fields(string(raw)), " ")
			for _, p := range permissive {
				known = known || err == nil && strings.Contains(text, p)
			}
		}
		if !known {
			t.Errorf("%s: none of %v has a licence that is known here", module, files)
		}
	}
	if len(seen) < 20 {
		t.Errorf("only %d modules are linked", len(seen))
	}
	t.Logf("%d modules", len(seen))
}
