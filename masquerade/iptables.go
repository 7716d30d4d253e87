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

// ErrSet is in the error when the firewall refused the rule that looks into a set: the set is not there, or the kernel
// cannot match on sets. Without Input.DirectNodes there is no such rule.
var ErrSet = errors.New("no match on a set of addresses")

// DefaultWait is how long a command waits for the xtables lock, unless told otherwise.
const DefaultWait = 5 * time.Second

// IPTables is the Driver on iptables and ip6tables.
//
// The rules of iptables-nft are read from the kernel. A look at those of iptables-legacy costs two processes for each chain of
// ours: one for the chain and one for the hook's chain that calls it; the same goes for what of iptables-nft could not be read.
// What differs is put right by one iptables-restore for each family. Whatever is found missing is found by looking, never by
// remembering; remembered is only what saves needless looks: at chains that nobody wants and nobody but us makes, with a
// Watch at anything while it has heard of no change, and at tables of iptables-legacy, which change unheard, while they are the same.
type IPTables struct {
	host
	variant Variant
	wait    time.Duration
	sets    Sets // nil: the sets are somebody else's
	memory  memory
	guest   bool // the other driver's helper: what else there is of ours is wanted

	tools   addr.Per[*tool]
	written map[site]writing
	gone    map[site]bool
	swept   addr.Per[bool]
	legacy  addr.Per[legacySighting]
	moves   addr.Per[pace]
}

// pace bounds how often the call in FORWARD is moved, since another program may want the last place for itself:
// moveBurst times at once, and then every MoveEvery.
type pace struct{ spent time.Time }

const (
	moveBurst = 10
	// MoveEvery is when to look again after a JumpContested.
	MoveEvery = 5 * time.Second
)

// take returns the pace after one more move, and false while there must be none.
func (p pace) take(now time.Time) (pace, bool) {
	if p.spent.Sub(now) > (moveBurst-1)*MoveEvery {
		return p, false
	}
	if p.spent.Before(now) {
		p.spent = now
	}
	return pace{p.spent.Add(MoveEvery)}, true
}

// legacySighting is when a ruleset was seen in place in iptables-legacy: when the tables were like this.
type legacySighting struct {
	tables [2]uint64
	want   Ruleset
}

// site is a place in one family.
type site struct {
	family addr.Family
	place  Place
}

// writing remembers how this iptables prints what we wrote, since versions differ in that.
type writing struct{ rendered, printed text }

// NewIPTables makes the driver, for rulesets without sets, or with sets that the caller keeps; it starts no process and
// needs none of the programs until it is used. A wait of zero means DefaultWait.
func NewIPTables(variant Variant, wait time.Duration) *IPTables {
	if wait <= 0 {
		wait = DefaultWait
	}
	return &IPTables{host: newHost(nil), variant: variant, wait: wait, written: map[site]writing{}, gone: map[site]bool{}}
}

var _ Driver = (*IPTables)(nil)

// Ensure implements Driver. When it has run for the first time, what an earlier daemon left behind in the tables of the
// other variant and in nftables is gone as well.
func (d *IPTables) Ensure(ctx context.Context, want []Ruleset) (Result, error) {
	return d.memory.rounds(func() (Result, error) {
		return eachFamily(want, func(rs Ruleset) (Result, error) { return d.ensureFamily(ctx, rs) })
	})
}

// Notified implements Driver.
func (d *IPTables) Notified() bool { return d.memory.complete() }

func (d *IPTables) ensureFamily(ctx context.Context, rs Ruleset) (res Result, err error) {
	t, err := d.tool(ctx, rs.Family)
	if len(rs.Chains) == 0 && errors.Is(err, exec.ErrNotFound) {
		_, err := d.memory.look(rs, func() ([]Drift, error) { return nil, nil })
		return res, err // a family not in use needs no program
	}
	if err != nil {
		return res, err
	}
	var inSets []Drift
	if inSets, res.NoSets = d.fillSets(rs); res.NoSets != nil {
		rs = rs.withoutSets()
	}
	inRules, err := d.ensureRules(ctx, t, rs)
	if errors.Is(err, ErrSet) {
		res.NoSets, rs = err, rs.withoutSets()
		inRules, err = d.ensureRules(ctx, t, rs)
	}
	res.Drifts = slices.Concat(inSets, inRules)
	if err != nil {
		return res, err
	}
	if err := d.sweep(ctx, t); err != nil {
		return res, err
	}
	return res, d.dropSets(rs)
}

// ensureRules is for a family whose sets are there.
func (d *IPTables) ensureRules(ctx context.Context, t *tool, rs Ruleset) ([]Drift, error) {
	repair := func() ([]Drift, error) { return d.repair(ctx, t, rs) }
	if t.legacy {
		d.memory.forget(t.family)
		return d.lookLegacy(rs, repair)
	}
	return d.memory.look(rs, repair)
}

// lookLegacy repairs what a look finds. Nobody looks at tables that are as they were when all was in place.
func (d *IPTables) lookLegacy(rs Ruleset, repair func() ([]Drift, error)) ([]Drift, error) {
	tables, known := d.legacyTables(rs.Family)
	last := d.legacy.Get(rs.Family)
	if known && last.tables == tables && last.want.Equal(rs) {
		return nil, nil
	}
	d.legacy.Set(rs.Family, legacySighting{})
	drifts, err := repair()
	if known && err == nil && len(drifts) == 0 {
		d.legacy.Set(rs.Family, legacySighting{tables, rs})
	}
	return drifts, err
}

// legacyTables are numbers that change with the tables that can hold rules of ours; zero for one that does not exist.
func (d *IPTables) legacyTables(f addr.Family) (tables [2]uint64, known bool) {
	names, err := legacyNames(f)
	for i, p := range Places() {
		if err == nil && slices.Contains(names, string(p.Table)) {
			tables[i], err = d.kernel.LegacyTable(f, string(p.Table))
		}
	}
	return tables, err == nil
}

// fillSets makes the sets that rules name. It is cheap, and needs to be: nothing tells of changes in them.
func (d *IPTables) fillSets(rs Ruleset) (drifts []Drift, err error) {
	if d.sets == nil {
		return nil, nil
	}
	for _, s := range rs.Sets {
		changed, err := d.sets.Ensure(s.Name, rs.Family, s.Networks, s.Members)
		if changed > 0 {
			drifts = append(drifts, Drift{rs.Family, postRouting(), SetChanged}) // only rules there look into a set
		}
		if err != nil {
			return drifts, err
		}
	}
	return drifts, nil
}

// dropSets removes the sets that no rule names any more.
func (d *IPTables) dropSets(rs Ruleset) error {
	var errs []error
	for _, name := range setNames(rs.Family) {
		if d.sets != nil && !slices.ContainsFunc(rs.Sets, func(s Set) bool { return s.Name == name }) {
			errs = append(errs, d.sets.Remove(name))
		}
	}
	return errors.Join(errs...)
}

// sweep removes once what others of our drivers left, last, so that the packets are never without rules.
func (d *IPTables) sweep(ctx context.Context, t *tool) error {
	if d.guest || d.swept.Get(t.family) {
		return nil
	}
	if err := d.removeVariant(ctx, t.family, t.other()); err != nil {
		return fmt.Errorf("leftovers in the other variant: %w", err)
	}
	if err := d.removeNFT(ctx, t.family); err != nil {
		return fmt.Errorf("leftovers in nftables: %w", err)
	}
	d.swept.Set(t.family, true)
	return nil
}

// repair looks at all our places of one family and puts right what differs, in one transaction.
func (d *IPTables) repair(ctx context.Context, t *tool, rs Ruleset) ([]Drift, error) {
	var drifts []Drift
	var restore strings.Builder
	touched := map[Place]text{}
	for _, p := range Places() {
		c, wanted := rs.chain(p)
		kinds, sectionText, err := d.examine(ctx, t, p, c, wanted)
		if err != nil {
			return nil, err
		}
		for _, k := range kinds {
			drifts = append(drifts, Drift{t.family, p, k})
		}
		restore.WriteString(sectionText)
		if wanted && sectionText != "" {
			touched[p] = text{renderJump(p), render(c, t.randomFully)}
		}
	}
	if restore.Len() == 0 {
		return drifts, nil
	}
	if err := d.restore(ctx, t, restore.String()); err != nil {
		return nil, err
	}
	return drifts, d.readBack(ctx, t, touched)
}

// examine compares one place with what is wanted there; the text it returns puts right what differs.
func (d *IPTables) examine(ctx context.Context, t *tool, p Place, c Chain, wanted bool) ([]DriftKind, string, error) {
	at := site{t.family, p}
	if !wanted {
		delete(d.written, at)
		if d.gone[at] {
			return nil, "", nil
		}
		s, err := d.lookForLeftover(ctx, t, p)
		if err != nil {
			return nil, "", err
		}
		if !s.exists {
			d.gone[at] = true
			return nil, "", nil
		}
		return []DriftKind{Leftover}, removeText(p, s), nil
	}
	delete(d.gone, at)
	s, err := d.look(ctx, t, p)
	if err != nil {
		return nil, "", err
	}
	rendered := text{renderJump(p), render(c, t.randomFully)}
	expected := rendered
	if w, ok := d.written[at]; ok && w.rendered.equal(rendered) {
		expected = w.printed
	}
	if s.exists && (s.text(p).equal(rendered) || s.text(p).equal(expected)) {
		return nil, "", nil
	}
	kinds := differences(p, s, expected)
	if p.Hook == Forward && slices.Equal(kinds, []DriftKind{JumpMisplaced}) {
		moves, ok := d.moves.Get(t.family).take(time.Now())
		if d.moves.Set(t.family, moves); !ok {
			return []DriftKind{JumpContested}, "", nil
		}
	}
	return kinds, replaceText(p, s, rendered), nil
}

// readBack looks at what was just written and remembers how it is printed.
func (d *IPTables) readBack(ctx context.Context, t *tool, touched map[Place]text) error {
	for p, rendered := range touched {
		s, err := d.look(ctx, t, p)
		if err != nil {
			return err
		}
		printed := s.text(p)
		if !printed.equal(rendered) && !alike(rendered, printed) {
			return fmt.Errorf("%s table: %s is not as it was just written: another program may be writing there too", p.Table, p.Name)
		}
		d.written[site{t.family, p}] = writing{rendered, printed}
	}
	return nil
}

// Remove implements Driver: in the tables of both variants, in nftables, and the sets.
func (d *IPTables) Remove(ctx context.Context) error {
	var errs []error
	for _, f := range addr.Families() {
		if err := d.removeFamily(ctx, f); err != nil {
			errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
		}
	}
	d.forget()
	return errors.Join(errs...)
}

// forget makes the next look look at everything.
func (d *IPTables) forget() {
	clear(d.written)
	clear(d.gone)
	d.swept = addr.Per[bool]{}
	d.memory.seen, d.legacy = addr.Per[sighting]{}, addr.Per[legacySighting]{}
}

func (d *IPTables) removeFamily(ctx context.Context, f addr.Family) error {
	return errors.Join(
		d.removeVariant(ctx, f, VariantNFT),
		d.removeVariant(ctx, f, VariantLegacy),
		d.removeNFT(ctx, f),
		d.dropSets(Ruleset{Family: f}),
	)
}

// removeVariant takes our chains out of one variant's tables. Where its program is not installed nothing can be done,
// and on a host that has never had it there is nothing to do.
func (d *IPTables) removeVariant(ctx context.Context, f addr.Family, v Variant) error {
	t, err := d.variantTool(ctx, f, v)
	if errors.Is(err, exec.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	var restore strings.Builder
	for _, p := range Places() {
		s, err := d.lookForLeftover(ctx, t, p)
		if err != nil {
			return err
		}
		if s.exists {
			restore.WriteString(removeText(p, s))
		}
	}
	if restore.Len() == 0 {
		return nil
	}
	return d.restore(ctx, t, restore.String())
}

// look reads our chain and the hook's. That our chain cannot be listed means that it is missing, or that somebody put
// something into it that iptables cannot read; both are put right by writing it anew. The hook's chain is not ours, so
// that one unreadable is an error.
func (d *IPTables) look(ctx context.Context, t *tool, p Place) (found, error) {
	var s found
	var err error
	switch s.rules, err = d.list(ctx, t, p.Table, p.Name); {
	case err == nil:
		s.exists = true
	case !errors.Is(err, errNoChain) && exitStatus(err) != exitNoChain:
		return found{}, err
	}
	if s.hook, err = d.list(ctx, t, p.Table, string(p.Hook)); errors.Is(err, errNoChain) {
		return s, nil // iptables will make it
	}
	return s, err
}

// lookForLeftover is look for a chain that should not be there: it creates no table by looking, and takes a kernel or
// a program that cannot do iptables at all for one that has nothing of ours.
func (d *IPTables) lookForLeftover(ctx context.Context, t *tool, p Place) (found, error) {
	if t.legacy {
		if exists, err := legacyTable(t.family, p.Table); err != nil || !exists {
			return found{}, err
		}
	}
	rules, err := d.list(ctx, t, p.Table, p.Name)
	switch {
	case nothingThere(err):
		return found{}, nil
	case err != nil:
		return found{}, err
	}
	hook, err := d.list(ctx, t, p.Table, string(p.Hook))
	return found{true, rules, hook}, err
}

// errNoChain says that the kernel has no such chain.
var errNoChain = errors.New("no such chain")

// list returns the rules of one chain as iptables prints them. A program is started only where the kernel cannot be asked, or
// where it is not clear what its answer says of us.
func (d *IPTables) list(ctx context.Context, t *tool, table Table, chain string) ([]string, error) {
	if !t.legacy {
		words, err := d.kernel.Rules(t.family, string(table), chain)
		if errors.Is(err, os.ErrNotExist) {
			return nil, errNoChain
		}
		if rules := ruleLines(words); err == nil && !slices.ContainsFunc(rules, unclear) {
			return rules, nil
		}
	}
	out, err := d.run(ctx, "", t.list, "-w", d.seconds(), "-t", string(table), "-S", chain)
	if err != nil {
		return nil, err
	}
	var rules []string
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "-A ") {
			rules = append(rules, strings.TrimSpace(line))
		}
	}
	return rules, nil
}

func (d *IPTables) restore(ctx context.Context, t *tool, input string) error {
	_, err := d.run(ctx, input, t.restore, "--noflush", "-w", d.seconds())
	return explainRestore(err, input)
}

// seconds is the bound for the xtables lock; without one, iptables would not wait at all.
func (d *IPTables) seconds() string {
	return strconv.Itoa(max(1, int(d.wait.Round(time.Second)/time.Second)))
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

func legacyTable(f addr.Family, table Table) (bool, error) {
	names, err := legacyNames(f)
	return slices.Contains(names, string(table)), err
}

// tool is the pair of programs for one family, of one variant.
type tool struct {
	family        addr.Family
	list, restore string
	legacy        bool
	randomFully   bool
}

func (t *tool) other() Variant {
	if t.legacy {
		return VariantNFT
	}
	return VariantLegacy
}

// tool finds the programs once; while they cannot be found, every call looks again.
func (d *IPTables) tool(ctx context.Context, f addr.Family) (*tool, error) {
	if t := d.tools.Get(f); t != nil {
		return t, nil
	}
	t, err := d.variantTool(ctx, f, d.variant)
	if err == nil {
		d.tools.Set(f, t)
	}
	return t, err
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

// variantTool starts a process only where the program's file does not say which variant it is. (Those that do are at least 1.8.)
func (d *IPTables) variantTool(ctx context.Context, f addr.Family, v Variant) (*tool, error) {
	name := programName(f, v)
	restore, err := exec.LookPath(name + "-restore")
	if err != nil {
		return nil, err
	}
	file, _ := filepath.EvalSymlinks(restore)
	switch filepath.Base(file) {
	case "xtables-nft-multi":
		return &tool{f, name, restore, false, true}, nil
	case "xtables-legacy-multi":
		return &tool{f, name, restore, true, true}, nil
	}
	version, err := d.run(ctx, "", name, "--version")
	if err != nil {
		return nil, err
	}
	return &tool{f, name, restore, !strings.Contains(version, "nf_tables"), hasRandomFully(version)}, nil
}
