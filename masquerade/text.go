package masquerade

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// This file holds the words of iptables: what iptables-restore reads, and what `iptables -S` prints.

// replace is the input for `iptables-restore --noflush` that makes a change. In iptables-legacy that is all of it, in
// one transaction. In iptables-nft the jump is made by placeJump, but where there is no hook's chain or it is empty.
func (t *tables) replace(c change) string {
	var lines []string
	hook := c.before.hook
	jump := renderJump(c.Place)
	if t.legacy {
		for _, old := range hook.jumps() {
			lines = append(lines, "-D"+strings.TrimPrefix(old.text, "-A"))
		}
		if _, should := hook.place(c.Place); should < len(hook.others()) {
			jump = strings.Replace(jump, "-A "+string(c.Hook), fmt.Sprintf("-I %s %d", c.Hook, should+1), 1)
		}
	}
	if c.chain || t.legacy {
		lines = append(lines, ":"+c.Name+" - [0:0]") // creates the chain, or empties it
		lines = append(lines, c.rules...)
	}
	if t.legacy || len(hook) == 0 {
		lines = append(lines, jump)
	}
	if len(lines) == 0 {
		return ""
	}
	return "*" + string(c.Table) + "\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
}

// jumpComment marks the rule in the hook's chain as ours for whoever reads the firewall.
const jumpComment = "overlayd"

// render writes the rules of a chain exactly as `iptables -S` prints them.
func render(c Chain, randomFully bool) []string {
	lines := make([]string, len(c.Rules))
	for i, r := range c.Rules {
		lines[i] = renderRule(c.Place, r, randomFully)
	}
	return lines
}

func renderRule(p Place, r Rule, randomFully bool) string {
	words := []string{"-A", p.Name}
	words = append(words, renderPrefix("-s", r.Src, false)...)
	words = append(words, renderPrefix("-d", r.Dst, r.DstNot)...)
	if r.OutDevice != "" {
		words = append(words, "-o", r.OutDevice)
	}
	if r.Mark.Mask != 0 {
		words = append(words, "-m", "mark")
		if r.MarkNot {
			words = append(words, "!")
		}
		words = append(words, "--mark", fmt.Sprintf("0x%x/0x%x", r.Mark.Value, r.Mark.Mask))
	}
	if r.DstSet != "" {
		words = append(words, "-m", "set")
		if r.DstSetNot {
			words = append(words, "!")
		}
		words = append(words, "--match-set", r.DstSet, "dst")
	}
	words = append(words, renderComment(p, r.Comment)...)
	words = append(words, "-j")
	switch r.Verdict {
	case Return:
		words = append(words, "RETURN")
	case Masquerade:
		words = append(words, "MASQUERADE")
	case SNAT:
		words = append(words, "SNAT", "--to-source", r.Source.String())
	case Unmark:
		words = append(words, "MARK", "--set-xmark", fmt.Sprintf("0x0/0x%x", r.Mark.Mask))
	case Accept:
		words = append(words, "ACCEPT")
	}
	if randomFully && (r.Verdict == Masquerade || r.Verdict == SNAT) {
		words = append(words, "--random-fully")
	}
	return strings.Join(words, " ")
}

// renderComment leaves out the comment where every packet passes. To iptables it is a match like others, which the
// kernel calls for each packet; two of them take 3 % of what it costs to forward one. Only the first packet of a
// connection passes the NAT table.
func renderComment(p Place, comment string) []string {
	switch {
	case p.Table != NAT:
		return nil
	case strings.Contains(comment, " "):
		comment = `"` + comment + `"`
	}
	return []string{"-m", "comment", "--comment", comment}
}

// renderPrefix leaves out the prefix of all addresses, as iptables does.
func renderPrefix(flag string, p netip.Prefix, not bool) []string {
	switch {
	case !p.IsValid() || p.Bits() == 0 && !not:
		return nil
	case not:
		return []string{"!", flag, p.String()}
	}
	return []string{flag, p.String()}
}

func renderJump(p Place) string {
	words := append([]string{"-A", string(p.Hook)}, renderComment(p, jumpComment)...)
	return strings.Join(append(words, "-j", p.Name), " ")
}

const aComment = `( -m comment --comment ("(\\.|[^"\\])*"|\S+))`

// policyRule and logRule know the same rules by the words of `iptables -S`.
var (
	policyRule = regexp.MustCompile(`^-A \S+` + aComment + `* -j (DROP|RETURN|REJECT( --reject-with \S+)?)$`)
	logRule    = regexp.MustCompile(`^-A \S+(` + aComment + `| -m limit( --limit(-burst)? \S+)*)* -j (LOG|NFLOG)( .*)?$`)
)

// readLine reads a rule that `iptables -S` printed.
func readLine(line string, p Place) hookRule {
	r := hookRule{text: line, plain: line == renderJump(p)}
	r.calls = strings.HasSuffix(line, " -j "+p.Name) || strings.HasSuffix(line, " -g "+p.Name)
	switch {
	case policyRule.MatchString(line):
		r.kind = policy
	case logRule.MatchString(line):
		r.kind = logs
	}
	return r
}
