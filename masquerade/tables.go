package masquerade

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/time/rate"

	"github.com/overlayd/overlayd/addr"
)

// Variant chooses between the two iptables programs that a host can have; their rules lie in different places in the
// kernel, and both apply.
type Variant string

// The variants.
const (
	VariantDefault Variant = ""       // the host's default iptables
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
	family addr.Family
	name   string // of the program
	legacy bool
	random bool   // MASQUERADE takes --random-fully
	wait   string // for the xtables lock, in seconds
	run    runner

	written map[Place]written
	noSets  error                   // why iptables rejected rules that match on a set, the last time; nil: it did not
	refused time.Time               // when that was
	moves   map[Place]*rate.Limiter // of the jumps, since another program may want the same place for its own
}

// written is the rules that were written at a place, and how the kernel showed them afterwards.
type written struct{ rules, shown []string }

// opener opens the tables of a family and variant; exec.ErrNotFound says that the program is missing.
type opener func(context.Context, addr.Family, Variant) (*tables, error)

// openTables finds the program, its version and what it can do. wait is for the xtables lock, of which iptables takes
// whole seconds.
func openTables(wait time.Duration) opener {
	return func(ctx context.Context, f addr.Family, v Variant) (*tables, error) {
		t := &tables{
			family: f, name: programName(f, v), legacy: v == VariantLegacy, run: execRun,
			wait:    strconv.Itoa(max(1, int(wait.Round(time.Second)/time.Second))),
			written: map[Place]written{}, moves: map[Place]*rate.Limiter{},
		}
		for _, p := range Places() {
			t.moves[p] = rate.NewLimiter(rate.Every(MoveEvery), moveBurst)
		}
		if !programThere(f, v) {
			return nil, fmt.Errorf("%s-restore: %w", t.name, exec.ErrNotFound)
		}
		if err := t.findVariant(ctx); err != nil {
			return nil, err
		}
		protocol := map[addr.Family]iptables.Protocol{addr.IPv4: iptables.ProtocolIPv4, addr.IPv6: iptables.ProtocolIPv6}[f]
		ipt, err := iptables.New(iptables.IPFamily(protocol), iptables.Path(t.name))
		if err != nil {
			return nil, fmt.Errorf("%s: %s", t.name, strings.Join(strings.Fields(err.Error()), " "))
		}
		t.random = ipt.HasRandomFully()
		return t, nil
	}
}

// findVariant tells which variant the program is, which go-iptables keeps to itself. Where the file does not say it,
// the program is asked: that also bounds the time of a program that does not end, which go-iptables would wait for.
func (t *tables) findVariant(ctx context.Context) error {
	path, err := exec.LookPath(t.name)
	if err != nil {
		return err
	}
	switch file, _ := filepath.EvalSymlinks(path); filepath.Base(file) {
	case "xtables-nft-multi":
		t.legacy = false
	case "xtables-legacy-multi":
		t.legacy = true
	default:
		version, err := execRun(ctx, "", t.name, "--version")
		if err != nil {
			return err
		}
		t.legacy = !strings.Contains(version, "nf_tables")
	}
	return nil
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

// seen is what stands in the firewall at one of our places.
type seen struct {
	chain []string // our chain's rules, each as it can be told from others; none where there is no chain
	hook  hookChain
}

// change is what has to be written at one place.
type change struct {
	Chain
	rules  []string // as iptables-restore reads them
	kinds  []DriftKind
	chain  bool // the chain has to be written, not the jump alone
	before seen
}

// ensure makes our chains in these tables the desired ones, each with one jump at its place. What is wrong at one place
// does not hold back the other.
func (t *tables) ensure(ctx context.Context, chains []Chain) (found []Drift, err error) {
	var changes []change
	for _, c := range chains {
		s, observeErr := t.observe(ctx, c.Place)
		if observeErr != nil {
			err = errors.Join(err, observeErr)
			continue
		}
		ch := change{Chain: c, rules: render(c, t.random), before: s}
		if kind := t.compareChain(c.Place, s, ch.rules); kind != "" {
			ch.kinds, ch.chain = []DriftKind{kind}, true
		}
		if kind := s.hook.jumpFault(c.Place); kind == JumpMisplaced && !ch.chain {
			ch.kinds = []DriftKind{JumpContested}
			if t.moves[c.Place].Allow() {
				ch.kinds[0] = JumpMisplaced
			}
		} else if kind != "" {
			ch.kinds = append(ch.kinds, kind)
		}
		switch {
		case len(ch.kinds) == 0:
			t.written[c.Place] = written{ch.rules, s.chain}
		case ch.kinds[0] == JumpContested:
			found = append(found, drifts(t.family, c.Place, JumpContested)...)
		default:
			changes = append(changes, ch)
		}
	}
	for i, changeErr := range t.apply(ctx, changes) {
		if changeErr == nil {
			found = append(found, drifts(t.family, changes[i].Place, changes[i].kinds...)...)
		}
		err = errors.Join(err, changeErr)
	}
	return found, err
}

// compareChain compares our chain with what was written. Of rules that this daemon has not written, iptables-legacy
// shows the words, which can be compared with ours.
func (t *tables) compareChain(p Place, s seen, rules []string) DriftKind {
	w, known := t.written[p]
	switch {
	case len(s.chain) == 0:
		return ChainMissing
	case !known && !slices.Equal(s.chain, rules):
		return Unverified
	case known && (!slices.Equal(s.chain, w.shown) || !slices.Equal(w.rules, rules)):
		return RulesChanged
	}
	return ""
}

// apply makes the changes, all by one iptables-restore or, where it rejects that, each by one of its own. It returns an
// error or nil for each.
func (t *tables) apply(ctx context.Context, changes []change) []error {
	errs := make([]error, len(changes))
	var all strings.Builder
	for _, c := range changes {
		all.WriteString(t.replace(c))
	}
	err := t.restore(ctx, all.String())
	for i, c := range changes {
		if errs[i] = err; err != nil && len(changes) > 1 {
			errs[i] = t.restore(ctx, t.replace(c))
		}
		if errs[i] == nil {
			errs[i] = t.finish(ctx, c)
		}
	}
	return errs
}

// finish makes the jump where iptables-restore has not done that, and reads what was written.
func (t *tables) finish(ctx context.Context, c change) error {
	s, err := t.observe(ctx, c.Place)
	if err == nil && !t.legacy && s.hook.jumpFault(c.Place) != "" {
		if err := placeJump(t.family, c.Place, s.hook); err != nil {
			return fmt.Errorf("%s table: place the jump to %s: %w", c.Table, c.Name, err)
		}
		s, err = t.observe(ctx, c.Place)
	}
	if err != nil {
		return err
	}
	t.written[c.Place] = written{c.rules, s.chain}
	if len(s.chain) != len(c.rules) || len(s.hook.jumps()) != 1 {
		t.written[c.Place] = written{}
		return fmt.Errorf("%s table: %s differs from what was just written: another program may be writing it too",
			c.Table, c.Name)
	}
	return nil
}

// placeJump replaces the jumps to our chain by one at its place, in one transaction.
func placeJump(f addr.Family, p Place, hook hookChain) error {
	conn := connect()
	table, chain := nftTable(f, string(p.Table)), &nftables.Chain{Name: string(p.Hook)}
	if err := deleteJumps(conn, f, p, hook); err != nil {
		return err
	}
	jump := &nftables.Rule{
		Table: table, Chain: chain,
		Exprs: []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictJump, Chain: p.Name}},
	}
	if p.Table == NAT { // as with our rules: where every packet passes, a comment costs
		jump.UserData = userdata.AppendString(nil, userdata.TypeComment, jumpComment)
	}
	others := hook.others()
	switch _, should := hook.place(p); should {
	case len(others):
		conn.AddRule(jump)
	case 0:
		conn.InsertRule(jump)
	default: // before a rule that was read: the chain's policy, or what logs for it
		jump.Position = others[should].handle
		conn.InsertRule(jump)
	}
	return conn.Flush()
}

// deleteJumps deletes the jumps to our chain.
func deleteJumps(conn *nftables.Conn, f addr.Family, p Place, hook hookChain) error {
	table, chain := nftTable(f, string(p.Table)), &nftables.Chain{Name: string(p.Hook)}
	for _, jump := range hook.jumps() {
		if err := conn.DelRule(&nftables.Rule{Table: table, Chain: chain, Handle: jump.handle}); err != nil {
			return err
		}
	}
	return nil
}

// observe reads our chain and the hook's. A dump of nf_tables can miss rules while another program commits a
// transaction: what was read counts if the generation stayed.
func (t *tables) observe(ctx context.Context, p Place) (seen, error) {
	if t.legacy {
		return t.observeLegacy(ctx, p)
	}
	for range maxReads {
		before, errBefore := generation()
		s, err := observeNFT(t.family, p)
		after, errAfter := generation()
		if err = errors.Join(errBefore, err, errAfter); err != nil || before == after {
			return s, err
		}
	}
	return seen{}, fmt.Errorf("%s table: other programs changed it %d times while it was read", p.Table, maxReads)
}

// maxReads is how often the chains are read until nothing changes meanwhile.
const maxReads = 10

func observeNFT(f addr.Family, p Place) (seen, error) {
	var s seen
	rules, err := nftRulesOf(f, string(p.Table), p.Name)
	for _, r := range rules {
		s.chain = append(s.chain, identity(r))
	}
	if err != nil {
		return s, err
	}
	hook, err := nftRulesOf(f, string(p.Table), string(p.Hook))
	for _, r := range hook {
		s.hook = append(s.hook, readRule(r, p.Name))
	}
	return s, err
}

func (t *tables) observeLegacy(ctx context.Context, p Place) (s seen, err error) {
	if s.chain, _, err = t.lines(ctx, p.Table, p.Name); err != nil {
		return s, err
	}
	hook, _, err := t.lines(ctx, p.Table, string(p.Hook))
	for _, line := range hook {
		s.hook = append(s.hook, readLine(line, p))
	}
	return s, err
}

// lines are the rules of a chain as iptables prints them; there is false where there is no such chain.
func (t *tables) lines(ctx context.Context, table Table, chain string) (rules []string, there bool, err error) {
	out, err := t.run(ctx, "", t.name, "-w", t.wait, "-t", string(table), "-S", chain)
	var said commandError
	if errors.As(err, &said) && said.status == 1 { // of all reasons only that one
		return nil, false, nil
	}
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "-A ") {
			rules = append(rules, strings.TrimSpace(line))
		}
	}
	return rules, err == nil, err
}

// removeLegacy takes our chains at these places out of the tables of iptables-legacy. It creates no table.
func removeLegacy(ctx context.Context, f addr.Family, places []Place, open opener) ([]Drift, error) {
	names, err := legacyNames(f)
	isMissing := func(p Place) bool { return !slices.Contains(names, string(p.Table)) }
	places = slices.DeleteFunc(slices.Clone(places), isMissing)
	if err != nil || len(places) == 0 || !programThere(f, VariantLegacy) {
		return nil, err
	}
	t, err := open(ctx, f, VariantLegacy)
	if err != nil {
		return nil, err
	}
	var found []Drift
	var input strings.Builder
	for _, p := range places {
		_, there, err := t.lines(ctx, p.Table, p.Name)
		if err != nil {
			return nil, err
		}
		if !there {
			continue
		}
		s, err := t.observe(ctx, p)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&input, "*%s\n", p.Table)
		for _, jump := range s.hook.jumps() {
			fmt.Fprintf(&input, "-D%s\n", strings.TrimPrefix(jump.text, "-A"))
		}
		fmt.Fprintf(&input, "-F %s\n-X %s\nCOMMIT\n", p.Name, p.Name)
		found = append(found, drifts(f, p, Leftover)...)
	}
	if len(found) == 0 {
		return nil, nil
	}
	return found, t.restore(ctx, input.String())
}

// removeNFT is removeLegacy for iptables-nft, whose tables are tables of nf_tables as others are. It needs no program.
func removeNFT(f addr.Family, places []Place) ([]Drift, error) {
	var found []Drift
	for _, p := range places {
		conn := connect()
		chain := &nftables.Chain{Table: nftTable(f, string(p.Table)), Name: p.Name}
		if have, err := findChain(f, string(p.Table), p.Name); err != nil || have == nil {
			continue // a kernel without nf_tables has nothing of ours
		}
		s, err := observeNFT(f, p)
		if err != nil {
			return found, fmt.Errorf("iptables-nft, %s table: %w", p.Table, err)
		}
		if err := deleteJumps(conn, f, p, s.hook); err != nil {
			return found, err
		}
		conn.FlushChain(chain)
		conn.DelChain(chain)
		if err := conn.Flush(); err != nil {
			return found, fmt.Errorf("iptables-nft, %s table: remove chain %s (does another rule still jump to it?): %w",
				p.Table, p.Name, err)
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
