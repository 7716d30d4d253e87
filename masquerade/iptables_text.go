package masquerade

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// This file is the pure half of the iptables driver: rules as iptables prints them, what differs, and the text for
// iptables-restore that puts it right.

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
		words = append(words, "-m", "mark", "--mark", fmt.Sprintf("0x%x/0x%x", r.Mark.Value, r.Mark.Mask))
	}
	if r.DstSet != "" {
		words = append(words, "-m", "set")
		if r.DstSetNot {
			words = append(words, "!")
		}
		words = append(words, "--match-set", r.DstSet, "dst")
	}
	words = append(words, renderComment(p, r.Comment)...)
	words = append(words, "-j", target(r.Verdict))
	if r.Verdict == Masquerade && randomFully {
		words = append(words, "--random-fully")
	}
	return strings.Join(words, " ")
}

// renderComment leaves out the comment where every packet passes. To iptables it is a match like others, which the kernel calls
// for each packet; two of them take 3 % of what it costs to forward one. The NAT table sees only the first packet of a connection.
func renderComment(p Place, comment string) []string {
	if p.Table != NAT {
		return nil
	}
	return []string{"-m", "comment", "--comment", quote(comment)}
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

func target(v Verdict) string {
	return map[Verdict]string{Return: "RETURN", Masquerade: "MASQUERADE", Accept: "ACCEPT"}[v]
}

func quote(s string) string {
	plain := func(r rune) bool {
		return r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
	}
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !plain(r) }) {
		return s
	}
	return `"` + strings.NewReplacer(`"`, `\"`, `\`, `\\`, `'`, `\'`).Replace(s) + `"`
}

// ruleLines writes rules that are read from the kernel as iptables prints them.
func ruleLines(rules [][]string) []string {
	lines := make([]string, len(rules))
	for i, words := range rules {
		words = slices.Clone(words)
		for n := 1; n < len(words); n++ {
			if words[n-1] == "--comment" {
				words[n] = quote(words[n])
			}
		}
		lines[i] = strings.Join(words, " ")
	}
	return lines
}

// unclear tells whether a rule concerns us and could not be read. It may be taken for so without being it, which does no harm.
func unclear(line string) bool {
	return strings.Contains(line, " ?") && strings.Contains(line, ourPrefix)
}

// ourPrefix is what the names of our chains begin with.
const ourPrefix = "OVERLAYD-"

// hasRandomFully reads a version, "iptables v1.8.9 (nf_tables)". The option came with 1.6.2.
func hasRandomFully(version string) bool {
	var name string
	v := make([]int, 3)
	_, _ = fmt.Sscanf(version, "%s v%d.%d.%d", &name, &v[0], &v[1], &v[2]) // what is missing is zero
	return slices.Compare(v, []int{1, 6, 2}) >= 0
}

func renderJump(p Place) string {
	words := append([]string{"-A", string(p.Hook)}, renderComment(p, jumpComment)...)
	return strings.Join(append(words, "-j", p.Name), " ")
}

// text is a chain of ours together with its call, as iptables prints them.
type text struct {
	jump  string
	rules []string
}

func (a text) equal(b text) bool { return a.jump == b.jump && slices.Equal(a.rules, b.rules) }

// alike tells whether printed may be another iptables's way to write rendered: the same number of rules, each with its
// verdict and its comment at its place. It keeps a rule that somebody slipped in during a repair from passing as ours.
func alike(rendered, printed text) bool {
	if len(rendered.rules) != len(printed.rules) || printed.jump == "" {
		return false
	}
	for i, line := range rendered.rules {
		head, verdict, _ := strings.Cut(line, " -j ")
		_, comment, _ := strings.Cut(head, " --comment ")
		verdict, _, _ = strings.Cut(verdict, " ")
		got := printed.rules[i]
		if !strings.Contains(got, strings.Trim(comment, `"`)) || !strings.Contains(got+" ", " -j "+verdict+" ") {
			return false
		}
	}
	return true
}

// found is what stands in the firewall at one of our places.
type found struct {
	exists bool
	rules  []string // of our chain
	hook   []string // of the chain that has to call it
}

// jumps are the rules in the hook's chain that call our chain, under whatever condition.
func (s found) jumps(p Place) []string {
	var calls []string
	for _, line := range s.hook {
		if strings.HasSuffix(line, " -j "+p.Name) || strings.HasSuffix(line, " -g "+p.Name) {
			calls = append(calls, line)
		}
	}
	return calls
}

// others are the rules in the hook's chain that do not call ours.
func (s found) others(p Place) []string {
	calls := s.jumps(p)
	return slices.DeleteFunc(slices.Clone(s.hook), func(line string) bool { return slices.Contains(calls, line) })
}

// place is how many rules of others the first call of our chain stands behind, and how many it has to. In FORWARD these
// are all: our accepts are for packets that no other rule has decided about. A rule that no packet gets past is the
// chain's policy by another name: ours come before it, whatever another program has put behind it in vain. Where such a
// rule was put in front of our call, it counts as that only if nothing else follows it: to stop everything for a while
// has its effect.
func (s found) place(p Place) (is, want int) {
	if calls := s.jumps(p); len(calls) > 0 {
		is = slices.Index(s.hook, calls[0])
	}
	if p.Hook != Forward {
		return is, 0
	}
	others := s.others(p)
	if first := slices.IndexFunc(others, isPolicy); first >= 0 && is <= first {
		return is, beforeLogs(others[:first])
	}
	want = len(others)
	for want > 0 && isPolicy(others[want-1]) {
		want--
	}
	if want < len(others) {
		want = beforeLogs(others[:want])
	}
	return is, want
}

// beforeLogs is how many rules stand before those that log what the policy behind them takes. They would say of packets
// which we accept that these were dropped.
func beforeLogs(rules []string) int {
	n := len(rules)
	for n > 0 && logRule.MatchString(rules[n-1]) {
		n--
	}
	return n
}

// What is no condition: a comment, and nft's log, which may stand in one rule with a verdict.
const aComment = `( -m comment --comment ("(\\.|[^"\\])*"|\S+)| -m log)`

// policyRule matches a rule without a condition that ends the chain with no accept. logRule matches one that only logs,
// how often it may be.
var (
	policyRule = regexp.MustCompile(`^-A \S+` + aComment + `* -j (DROP|RETURN|REJECT( --reject-with \S+)?)$`)
	logRule    = regexp.MustCompile(`^-A \S+(` + aComment + `| -m limit( --limit(-burst)? \S+)*)*( -m log` +
		aComment + `*| -j (LOG|NFLOG)( .*)?)$`)
)

func isPolicy(rule string) bool { return policyRule.MatchString(rule) }

// text is what was found, in the form in which it is compared. The jump is empty unless it is the one, at its place.
func (s found) text(p Place) text {
	t := text{rules: s.rules}
	if is, want := s.place(p); is == want && len(s.jumps(p)) == 1 {
		t.jump = s.jumps(p)[0]
	}
	return t
}

// differences compares what was found with what is wanted.
func differences(p Place, s found, want text) []DriftKind {
	var kinds []DriftKind
	switch {
	case !s.exists:
		kinds = append(kinds, ChainMissing)
	case !slices.Equal(s.rules, want.rules):
		kinds = append(kinds, RulesChanged)
	}
	calls := s.jumps(p)
	is, at := s.place(p)
	switch {
	case len(calls) == 0:
		kinds = append(kinds, JumpMissing)
	case len(calls) > 1:
		kinds = append(kinds, JumpRepeated)
	case is != at:
		kinds = append(kinds, JumpMisplaced)
	case calls[0] != want.jump:
		kinds = append(kinds, JumpChanged)
	}
	return kinds
}

// replaceText is the input for `iptables-restore --noflush` that replaces our chain and its calls in one transaction.
func replaceText(p Place, s found, want text) string {
	lines := deleteJumps(p, s)
	lines = append(lines, ":"+p.Name+" - [0:0]") // creates the chain, or empties it
	lines = append(lines, want.rules...)
	jump := want.jump
	if _, at := s.place(p); at < len(s.others(p)) {
		jump = strings.Replace(jump, "-A "+string(p.Hook), fmt.Sprintf("-I %s %d", p.Hook, at+1), 1)
	}
	return section(p.Table, append(lines, jump))
}

// removeText is the input for `iptables-restore --noflush` that takes out our chain and its calls.
func removeText(p Place, s found) string {
	return section(p.Table, append(deleteJumps(p, s), "-F "+p.Name, "-X "+p.Name))
}

func deleteJumps(p Place, s found) []string {
	var lines []string
	for _, call := range s.jumps(p) {
		lines = append(lines, "-D"+strings.TrimPrefix(call, "-A"))
	}
	return lines
}

func section(t Table, lines []string) string {
	return "*" + string(t) + "\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
}
