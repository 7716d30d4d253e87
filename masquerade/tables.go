package masquerade

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"

	"github.com/overlayd/overlayd/addr"
)

// Variant chooses between the two iptables programs that a host can have; their rules lie in different places in the
// kernel, and both apply.
type Variant string

// The variants.
const (
	VariantDefault Variant = ""       // whatever the host calls iptables
	VariantNFT     Variant = "nft"    // iptables-nft
	VariantLegacy  Variant = "legacy" // iptables-legacy
)

// ParseVariant reads a variant from a flag.
func ParseVariant(s string) (Variant, error) {
	switch v := Variant(s); v {
	case VariantDefault, VariantNFT, VariantLegacy:
		return v, nil
	}
	return "", fmt.Errorf("%q is not an iptables variant: expected nft, legacy or nothing", s)
}

// tables are the tables of iptables of one family and one variant. Both drivers keep their chains there through this
// type, which owns the place of our jumps.
//
// What iptables-nft has in the kernel is read from nf_tables, without a process; what iptables-legacy has is what
// `iptables -S` prints. Rules are not compared with the desired ones, which each version of iptables turns into
// something of its own, but with what was read back after they were written.
type tables struct {
	family  addr.Family
	name    string // of the program
	legacy  bool
	random  bool // MASQUERADE takes --random-fully
	seconds int  // to wait for the xtables lock
	list    func(table, chain string) ([]string, error)
	run     runner // for iptables-restore

	written map[Place]written
	pace    pace
}

// written is what was written at a place, and how the kernel showed it afterwards: the rules and, last, the jump.
type written struct{ rules, shown []string }

// opener opens the tables of a family and variant; exec.ErrNotFound says that the program is missing.
type opener func(addr.Family, Variant) (*tables, error)

// openTables finds the program. wait is for the xtables lock, of which iptables takes whole seconds.
func openTables(wait time.Duration) opener {
	return func(f addr.Family, v Variant) (*tables, error) {
		t := &tables{
			family: f, name: programName(f, v), legacy: v == VariantLegacy,
			seconds: max(1, int(wait.Round(time.Second)/time.Second)), run: execRun, written: map[Place]written{},
		}
		protocol := iptables.ProtocolIPv4
		if f == addr.IPv6 {
			protocol = iptables.ProtocolIPv6
		}
		if !programThere(f, v) {
			return nil, fmt.Errorf("%s-restore: %w", t.name, exec.ErrNotFound)
		}
		ipt, err := iptables.New(iptables.IPFamily(protocol), iptables.Path(t.name), iptables.Timeout(t.seconds))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", t.name, err)
		}
		t.list, t.random = ipt.List, ipt.HasRandomFully()
		if v == VariantDefault {
			t.legacy, err = defaultIsLegacy(t.name)
		}
		return t, err
	}
}

// programName is what the program of a family and variant is called.
func programName(f addr.Family, v Variant) string {
	name := "iptables"
	if f == addr.IPv6 {
		name = "ip6tables"
	}
	if v != VariantDefault {
		name += "-" + string(v)
	}
	return name
}

func programThere(f addr.Family, v Variant) bool {
	_, err := exec.LookPath(programName(f, v) + "-restore")
	return err == nil
}

// defaultIsLegacy tells which variant a program without one in its name is, which go-iptables keeps to itself. A process
// is started only where the program's file does not say it.
func defaultIsLegacy(name string) (bool, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return false, err
	}
	switch file, _ := filepath.EvalSymlinks(path); filepath.Base(file) {
	case "xtables-nft-multi":
		return false, nil
	case "xtables-legacy-multi":
		return true, nil
	}
	version, err := execRun(context.Background(), "", name, "--version")
	return !strings.Contains(version, "nf_tables"), err
}

// seen is what stands in the firewall at one of our places.
type seen struct {
	chain []string // our chain's rules, each as it can be told from others; none where there is no chain
	hook  hookChain
}

func (s seen) equal(o seen) bool {
	return slices.Equal(s.chain, o.chain) && slices.Equal(s.hook, o.hook)
}

// ensure makes our chains in these tables the desired ones, each with one jump at its place, by one iptables-restore.
func (t *tables) ensure(ctx context.Context, chains []Chain) ([]Drift, error) {
	var found []Drift
	var input strings.Builder
	var changed []Chain
	replaced := map[Place]hookChain{}
	for _, c := range chains {
		s, err := t.observe(c.Place)
		if err != nil {
			return nil, err
		}
		rules := render(c, t.random)
		kinds := t.differences(c.Place, s, rules)
		found = append(found, drifts(t.family, c.Place, kinds...)...)
		if len(kinds) == 0 {
			t.written[c.Place] = written{rules, append(s.chain, s.hook.jumps()[0].id)}
		}
		if len(kinds) == 0 || kinds[0] == JumpContested {
			continue
		}
		changed = append(changed, c)
		text, old := replaceChain(c.Place, s, rules)
		input.WriteString(text)
		replaced[c.Place] = old
	}
	if len(changed) == 0 {
		return found, nil
	}
	if err := t.restore(ctx, input.String()); err != nil {
		return nil, err
	}
	for _, c := range changed {
		if err := t.deleteJumps(c.Place, replaced[c.Place]); err != nil {
			return nil, err
		}
		s, err := t.observe(c.Place)
		if err != nil {
			return nil, err
		}
		t.written[c.Place] = written{render(c, t.random), []string{""}}
		if len(s.chain) != len(c.Rules) || len(s.hook.jumps()) != 1 {
			return nil, fmt.Errorf("%s table: %s is not as it was just written: another program may be writing there too",
				c.Table, c.Name)
		}
		t.written[c.Place] = written{render(c, t.random), append(s.chain, s.hook.jumps()[0].id)}
	}
	return found, nil
}

// differences compares what stands at a place with what was written there. Of rules that this daemon has not written,
// iptables-legacy shows the words, which can be compared with ours.
func (t *tables) differences(p Place, s seen, rules []string) (kinds []DriftKind) {
	w, known := t.written[p]
	shown := w.shown
	if !known {
		shown = append(slices.Clone(rules), renderJump(p))
	}
	chain, jump := shown[:len(shown)-1], shown[len(shown)-1]
	jumps := s.hook.jumps()
	is, want := s.hook.place(p)
	switch {
	case len(s.chain) == 0:
		kinds = append(kinds, ChainMissing)
	case !slices.Equal(s.chain, chain) && !known:
		kinds = append(kinds, Unverified)
	case !slices.Equal(s.chain, chain), known && !slices.Equal(w.rules, rules):
		kinds = append(kinds, RulesChanged)
	}
	switch {
	case len(jumps) == 0:
		kinds = append(kinds, JumpMissing)
	case len(jumps) > 1:
		kinds = append(kinds, JumpRepeated)
	case is != want:
		kinds = append(kinds, JumpMisplaced)
	case jumps[0].id != jump && (known || len(kinds) == 0):
		kinds = append(kinds, JumpChanged)
	}
	if p.Hook == Forward && slices.Equal(kinds, []DriftKind{JumpMisplaced}) {
		var ok bool
		if t.pace, ok = t.pace.take(time.Now()); !ok {
			return []DriftKind{JumpContested}
		}
	}
	return kinds
}

// observe reads our chain and the hook's. A dump of nf_tables can miss rules while another program commits a
// transaction, and the library does not say when that was so: what was read counts if it was read twice.
func (t *tables) observe(p Place) (seen, error) {
	if t.legacy {
		return t.observeText(p)
	}
	var last seen
	for n := range maxReads {
		s, err := observeNFT(t.family, p)
		if err != nil { // of a rule that the library cannot read, as likely as not
			return t.observeText(p)
		}
		if n > 0 && s.equal(last) {
			return s, nil
		}
		last = s
	}
	return last, fmt.Errorf("%s table: other programs changed it %d times while it was read", p.Table, maxReads)
}

// maxReads is how often the chains are read until they are the same twice.
const maxReads = 10

func observeNFT(f addr.Family, p Place) (seen, error) {
	var s seen
	conn := &nftables.Conn{}
	table := nftTable(f, string(p.Table))
	rules, err := conn.GetRules(table, &nftables.Chain{Name: p.Name})
	if err != nil {
		return s, err
	}
	for _, r := range rules {
		s.chain = append(s.chain, identity(r))
	}
	hook, err := conn.GetRules(table, &nftables.Chain{Name: string(p.Hook)})
	for _, r := range hook {
		s.hook = append(s.hook, readRule(r, p.Name))
	}
	return s, err
}

// observeText is observe by `iptables -S`. That our chain cannot be listed means that it is missing, or that iptables
// cannot read what another program put into it; both are repaired by writing it again.
func (t *tables) observeText(p Place) (s seen, err error) {
	if s.chain, _, err = t.lines(p.Table, p.Name); err != nil {
		return s, err
	}
	hook, ok, err := t.lines(p.Table, string(p.Hook))
	if err == nil && !ok {
		err = fmt.Errorf("%s cannot read the chain %s of table %s", t.name, p.Hook, p.Table)
	}
	for _, line := range hook {
		s.hook = append(s.hook, readLine(line, p.Name))
	}
	return s, err
}

// lines are the rules of a chain as iptables prints them. It is not ok where there is no such chain, or one that
// iptables cannot read: it says both by exit status 1.
func (t *tables) lines(table Table, chain string) (rules []string, ok bool, err error) {
	lines, err := t.list(string(table), chain)
	var failed *iptables.Error
	switch {
	case errors.As(err, &failed) && failed.ExitStatus() == 1:
		return nil, false, nil
	case err != nil:
		_, said, _ := strings.Cut(err.Error(), ": exit status ")
		_, said, _ = strings.Cut(said, ": ")
		return nil, false, fmt.Errorf("%s -t %s -S %s: %s", t.name, table, chain, cmp.Or(firstLine(said), err.Error()))
	}
	return slices.DeleteFunc(lines, func(line string) bool { return !strings.HasPrefix(line, "-A ") }), true, nil
}

// deleteJumps deletes the jumps that a new one replaces by their handles: whatever happened to the chain since, no other
// rule goes. One that another program has deleted meanwhile is fine.
func (t *tables) deleteJumps(p Place, old hookChain) error {
	for _, jump := range old {
		conn := &nftables.Conn{}
		r := &nftables.Rule{Table: nftTable(t.family, string(p.Table)), Chain: &nftables.Chain{Name: string(p.Hook)}, Handle: jump.handle}
		if err := conn.DelRule(r); err != nil {
			return err
		}
		if err := conn.Flush(); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s table: delete a jump to %s: %w", p.Table, p.Name, err)
		}
	}
	return nil
}

// removeIPTables takes our chains at these places out of one variant's tables. It creates no table by looking, and
// needs no program where there is nothing of ours.
func removeIPTables(ctx context.Context, f addr.Family, places []Place, v Variant, open opener) ([]Drift, error) {
	if v == VariantNFT {
		return removeNFT(f, places)
	}
	names, err := legacyNames(f)
	places = slices.DeleteFunc(slices.Clone(places), func(p Place) bool { return !slices.Contains(names, string(p.Table)) })
	if err != nil || len(places) == 0 || !programThere(f, v) {
		return nil, err
	}
	t, err := open(f, v)
	if err != nil {
		return nil, err
	}
	var found []Drift
	var input strings.Builder
	for _, p := range places {
		_, ok, err := t.lines(p.Table, p.Name)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		s, err := t.observe(p)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&input, "*%s\n", p.Table)
		for _, jump := range s.hook.jumps() {
			fmt.Fprintf(&input, "-D%s\n", strings.TrimPrefix(jump.id, "-A"))
		}
		fmt.Fprintf(&input, "-F %s\n-X %s\nCOMMIT\n", p.Name, p.Name)
		found = append(found, drifts(f, p, Leftover)...)
	}
	if len(found) == 0 {
		return nil, nil
	}
	return found, t.restore(ctx, input.String())
}

// removeNFT is removeIPTables for iptables-nft: its tables are tables of nf_tables as others are.
func removeNFT(f addr.Family, places []Place) ([]Drift, error) {
	var found []Drift
	for _, p := range places {
		conn := &nftables.Conn{}
		table := nftTable(f, string(p.Table))
		chain := &nftables.Chain{Table: table, Name: p.Name}
		if have, err := findChain(f, string(p.Table), p.Name); err != nil || have == nil {
			continue // a kernel without nf_tables has nothing of ours
		}
		s, err := observeNFT(f, p)
		if err != nil {
			return found, fmt.Errorf("%s table: %w", p.Table, err)
		}
		for _, jump := range s.hook.jumps() {
			r := &nftables.Rule{Table: table, Chain: &nftables.Chain{Name: string(p.Hook)}, Handle: jump.handle}
			if err := conn.DelRule(r); err != nil {
				return found, err
			}
		}
		conn.FlushChain(chain)
		conn.DelChain(chain)
		if err := conn.Flush(); err != nil {
			return found, fmt.Errorf("%s table: remove chain %s (does another rule still jump to it?): %w", p.Table, p.Name, err)
		}
		found = append(found, drifts(f, p, Leftover)...)
	}
	return found, nil
}

// legacyNames are the tables of the legacy variant that exist in this network namespace: listing one would make it.
// (thread-self, because a test's thread may be in another namespace than its process.)
func legacyNames(f addr.Family) ([]string, error) {
	name := "ip_tables_names"
	if f == addr.IPv6 {
		name = "ip6_tables_names"
	}
	names, err := os.ReadFile(filepath.Join("/proc/thread-self/net", name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("which legacy tables exist: %w", err)
	}
	return strings.Fields(string(names)), nil
}
