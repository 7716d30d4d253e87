package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/overlayd/overlayd/dist"
)

// change is a safe one: a setting of the kernel, or a file that does not exist yet.
type change struct {
	sysctl, value string // its path below /proc/sys
	file          string // its full name; dist has what is written
}

func sysctl(path, value string) change { return change{sysctl: path, value: value} }

// command is the same for a shell.
func (x change) command() string {
	if x.sysctl != "" {
		return fmt.Sprintf("sysctl -w %s=%s", x.sysctl, x.value)
	}
	return "overlayd doctor --fix   # writes " + x.file
}

// commands are those of several.
func commands(changes []change) []string {
	var out []string
	for _, x := range changes {
		out = append(out, x.command())
	}
	return out
}

// Done is a change that Fix made, or could not make.
type Done struct {
	What string `json:"what"`
	Err  string `json:"error,omitempty"`
}

// Apply makes the safe changes of a report: settings of the kernel, and files that keep other programs off overlayd's
// devices. None of them interrupts traffic that flows. No file is overwritten. Settings are written below sysctlDir
// (--sysctl-dir): in a container /proc/sys is read-only.
func Apply(r Report, rootDir, sysctlDir string) []Done {
	var out []Done
	seen := map[change]bool{}
	for _, f := range r.Findings {
		for _, x := range f.changes {
			if seen[x] {
				continue
			}
			seen[x] = true
			what, err := x.apply(root(rootDir), sysctlDir)
			d := Done{What: what}
			if err != nil {
				d.Err = err.Error()
			}
			out = append(out, d)
		}
	}
	return out
}

func (x change) apply(r root, sysctlDir string) (string, error) {
	if x.sysctl != "" {
		was, _ := r.read("proc/sys/" + x.sysctl)
		what := fmt.Sprintf("%s = %s (was %s)", x.sysctl, x.value, was)
		err := os.WriteFile(r.path(filepath.Join(sysctlDir, x.sysctl)), []byte(x.value), 0o644)
		if err != nil {
			return what, err
		}
		if now, _ := r.read("proc/sys/" + x.sysctl); strings.Join(strings.Fields(now), " ") != x.value {
			return what, fmt.Errorf("it is %s after writing", now)
		}
		return what, nil
	}
	what := "write " + x.file
	content, err := dist.DropIns.ReadFile(strings.TrimPrefix(x.file, "/etc/"))
	if err != nil {
		return what, err
	}
	path := r.path(x.file)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return what, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return what, err
	}
	_, err = f.Write(content)
	return what, errors.Join(err, f.Close())
}
