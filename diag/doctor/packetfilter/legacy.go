package packetfilter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
)

// Legacy is a chain of iptables-legacy, whose rules are not judged.
type Legacy struct {
	Save   string // the program that lists it: "iptables-legacy-save" or "ip6tables-legacy-save"
	Table  string
	Chain  string
	Policy string   // "ACCEPT" or "DROP"; "-" for a chain that only others call
	Rules  []string // as the program writes them: "-A INPUT -p tcp -j DROP"
}

// ReadLegacy lists the chains of iptables-legacy in the network namespace of the calling thread. A program is started
// only where there are tables, of which it makes none. The error of a program that is not there wraps exec.ErrNotFound.
func ReadLegacy(ctx context.Context) ([]Legacy, error) {
	var out []Legacy
	var errs []error
	for _, ip := range []string{"ip", "ip6"} {
		save := ip + "tables-legacy-save"
		tables, err := os.ReadFile("/proc/thread-self/net/" + ip + "_tables_names")
		if len(tables) == 0 && (err == nil || errors.Is(err, fs.ErrNotExist)) {
			continue
		}
		var text []byte
		if err == nil {
			text, err = exec.CommandContext(ctx, save).Output()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("iptables-legacy has tables that cannot be read: %s: %w", save, err))
		}
		out = append(out, parseSave(save, string(text))...)
	}
	return out, errors.Join(errs...)
}

// parseSave reads the lines "*TABLE", ":CHAIN POLICY [0:0]" and "-A CHAIN ...".
func parseSave(save, text string) []Legacy {
	var out []Legacy
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch w := strings.Fields(line); {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case strings.HasPrefix(line, ":") && len(w) > 1:
			out = append(out, Legacy{Save: save, Table: table, Chain: w[0][1:], Policy: w[1]})
		case len(w) > 1 && w[0] == "-A":
			for i := range out {
				if c := &out[i]; c.Table == table && c.Chain == w[1] {
					c.Rules = append(c.Rules, line)
				}
			}
		}
	}
	return out
}
