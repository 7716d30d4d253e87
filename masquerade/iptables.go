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

	goiptables "github.com/coreos/go-iptables/iptables"

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
// A look costs two processes for each chain of ours: one for the chain and one for the hook's chain that calls it. What
// differs is put right by one iptables-restore for each family. Whatever is found missing is found by looking, never by
// remembering; remembered is only what saves needless looks at chains that nobody wants and nobody but us makes.
type IPTables struct {
	variant Variant
	wait    time.Duration
	run     runner

	tools   addr.Per[*tool]
	written map[site]writing
	gone    map[site]bool
	swept   addr.Per[bool]
}

// site is a place in one family.
type site struct {
	family addr.Family
	place  Place
}

// writing remembers how this iptables prints what we wrote, since versions differ in that.
type writing struct{ rendered, printed text }

// NewIPTables makes the driver; it starts no process and needs none of the programs until it is used. A wait of zero
// means DefaultWait.
func NewIPTables(variant Variant, wait time.Duration) *IPTables {
	if wait <= 0 {
		wait = DefaultWait
	}
	return &IPTables{variant: variant, wait: wait, run: execRun, written: map[site]writing{}, gone: map[site]bool{}}
}

var _ Driver = (*IPTables)(nil)

// Ensure implements Driver. When it has run for the first time, what an earlier daemon left behind in the tables of the
// other variant is gone as well.
func (d *IPTables) Ensure(ctx context.Context, want []Ruleset) ([]Drift, error) {
	wanted, err := byFamily(want)
	if err != nil {
		return nil, err
	}
	var drifts []Drift
	var errs []error
	for _, f := range addr.Families() {
		found, err := d.ensureFamily(ctx, f, wanted.Get(f))
		drifts = append(drifts, found...)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
		}
	}
	return drifts, errors.Join(errs...)
}

// byFamily checks what the types cannot say: each family once, only chains that are ours, each once.
func byFamily(want []Ruleset) (addr.Per[map[Place]Chain], error) {
	var wanted addr.Per[map[Place]Chain]
	ours := Places()
	for _, rs := range want {
		if !slices.Contains([]addr.Family{addr.IPv4, addr.IPv6}, rs.Family) || wanted.Get(rs.Family) != nil {
			return wanted, fmt.Errorf("a ruleset of no family, or a second one of the same: %s", rs.Family)
		}
		chains := map[Place]Chain{}
		for _, c := range rs.Chains {
			if _, twice := chains[c.Place]; twice || !slices.Contains(ours[:], c.Place) {
				return wanted, fmt.Errorf("%s: not one of our chains, or there twice: %v", rs.Family, c.Place)
			}
			chains[c.Place] = c
		}
		wanted.Set(rs.Family, chains)
	}
	return wanted, nil
}

func (d *IPTables) ensureFamily(ctx context.Context, f addr.Family, want map[Place]Chain) ([]Drift, error) {
	t, err := d.tool(ctx, f)
	if len(want) == 0 && errors.Is(err, exec.ErrNotFound) {
		return nil, nil // a family not in use needs no program
	}
	if err != nil {
		return nil, err
	}
	drifts, err := d.repair(ctx, t, want)
	if err != nil {
		return drifts, err
	}
	if d.swept.Get(f) {
		return drifts, nil
	}
	// Last, so that the packets are never without rules.
	if err := d.removeVariant(ctx, f, t.other()); err != nil {
		return drifts, fmt.Errorf("leftovers in the other variant: %w", err)
	}
	d.swept.Set(f, true)
	return drifts, nil
}

// repair looks at all our places of one family and puts right what differs, in one transaction.
func (d *IPTables) repair(ctx context.Context, t *tool, want map[Place]Chain) ([]Drift, error) {
	var drifts []Drift
	var restore strings.Builder
	touched := map[Place]text{}
	for _, p := range Places() {
		c, wanted := want[p]
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
		return nil, nil
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
	return differences(p, s, expected), replaceText(p, s, rendered), nil
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

// Remove implements Driver, in the tables of both variants.
func (d *IPTables) Remove(ctx context.Context) error {
	var errs []error
	for _, f := range addr.Families() {
		for _, v := range []Variant{VariantNFT, VariantLegacy} {
			if err := d.removeVariant(ctx, f, v); err != nil {
				errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
			}
		}
	}
	clear(d.written)
	clear(d.gone)
	d.swept = addr.Per[bool]{}
	return errors.Join(errs...)
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
	case exitStatus(err) != exitNoChain:
		return found{}, err
	}
	s.hook, err = d.list(ctx, t, p.Table, string(p.Hook))
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

// list returns the rules of one chain as iptables prints them.
func (d *IPTables) list(ctx context.Context, t *tool, table Table, chain string) ([]string, error) {
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

// legacyTable tells whether a table of the legacy variant exists in this network namespace: listing it would make it.
// (thread-self, because a test's thread may be in another namespace than its process.)
func legacyTable(f addr.Family, table Table) (bool, error) {
	name := "ip_tables_names"
	if f == addr.IPv6 {
		name = "ip6_tables_names"
	}
	names, err := os.ReadFile(filepath.Join("/proc/thread-self/net", name))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("which legacy tables exist: %w", err)
	}
	return slices.Contains(strings.Fields(string(names)), string(table)), nil
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

func (d *IPTables) variantTool(ctx context.Context, f addr.Family, v Variant) (*tool, error) {
	name, proto := "iptables", goiptables.ProtocolIPv4
	if f == addr.IPv6 {
		name, proto = "ip6tables", goiptables.ProtocolIPv6
	}
	if v != VariantDefault {
		name += "-" + string(v)
	}
	restore, err := exec.LookPath(name + "-restore")
	if err != nil {
		return nil, err
	}
	ipt, err := goiptables.New(goiptables.Path(name), goiptables.IPFamily(proto))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	// go-iptables keeps to itself which variant it found.
	version, err := d.run(ctx, "", name, "--version")
	if err != nil {
		return nil, err
	}
	return &tool{f, name, restore, !strings.Contains(version, "nf_tables"), ipt.HasRandomFully()}, nil
}
