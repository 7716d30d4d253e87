package masquerade

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"time"

	"github.com/google/nftables"

	"github.com/overlayd/overlayd/addr"
)

// Driver makes a firewall equal to rulesets. It belongs to one goroutine.
type Driver interface {
	// Ensure makes the firewall hold exactly these rulesets. One family's error does not hold back the other; what is in
	// the result beside an error has been repaired all the same. What another driver left behind goes as soon as the new
	// rules are in place. Where nothing has changed in nf_tables since rules like these were put in place, only the tables
	// of iptables-legacy and the members of sets are compared.
	Ensure(ctx context.Context, desired addr.Per[Ruleset]) (Result, error)
}

// Result is what Ensure has done.
type Result struct {
	// Drifts is what differed and has been repaired: nothing, if all was in place.
	Drifts []Drift
	// NoSets says why rules that match on a set had to be left out. These packets are then masqueraded: not what is
	// promised, but they arrive.
	NoSets error
	// ChooseAgain says that the host would choose another driver by now: kube-proxy has come, in its mode nftables. Its
	// chain is called before one of iptables that was there already, and would masquerade what our chain gives an address.
	ChooseAgain bool
}

// Sets keeps named sets of addresses or networks in the kernel, for a firewall that has none of its own. A set has to
// exist before a rule names it, and cannot be removed before the rule is.
type Sets interface {
	// Ensure makes the set hold exactly these members; it returns how many changes were made for it.
	Ensure(name string, f addr.Family, networks bool, members []netip.Prefix) (changed int, err error)
	// Remove removes the set; that there is none is fine.
	Remove(name string) error
}

// DriftKind is a way in which the firewall can differ from what is desired.
type DriftKind string

// The kinds of drift.
const (
	ChainMissing  DriftKind = "chain missing"      // our chain is missing or empty
	RulesChanged  DriftKind = "rules changed"      // our chain holds other rules, or in another order
	JumpMissing   DriftKind = "jump missing"       // nothing calls our chain
	JumpMisplaced DriftKind = "jump misplaced"     // the jump to our chain does not stand where it belongs
	JumpContested DriftKind = "jump contested"     // the same, and left so: it was moved too often
	JumpRepeated  DriftKind = "jump repeated"      // our chain is called more than once
	JumpChanged   DriftKind = "jump changed"       // our chain is called by another rule than the daemon's
	SetChanged    DriftKind = "set changed"        // a set holds other members
	Leftover      DriftKind = "left over"          // a chain of ours that is not desired
	Unverified    DriftKind = "rules not verified" // rules of an earlier daemon: they were written again
)

// Drift is one difference between the firewall and what is desired.
type Drift struct {
	Family addr.Family
	Place  Place
	Kind   DriftKind
}

func (d Drift) String() string {
	return fmt.Sprintf("%s %s %s: %s", d.Family, d.Place.Table, d.Place.Name, d.Kind)
}

// drifts are several kinds of drift at one place.
func drifts(f addr.Family, p Place, kinds ...DriftKind) []Drift {
	var out []Drift
	for _, k := range kinds {
		out = append(out, Drift{f, p, k})
	}
	return out
}

// driver is the Driver. On iptables, all our chains are in the tables of one variant, with the kernel's sets beside
// them. On nftables, masquerading is in a table of our own, which has its sets.
//
// The chain for FORWARD is not there, since it could not do what it is for. An accept ends only the base chain it is
// in; the chain of another table can still drop the packet. On most hosts the chain that drops is iptables' own
// FORWARD, whose policy Docker sets to DROP. There the accepts are needed, and only there they work: so they are put
// into that chain wherever it exists, and nowhere else.
type driver struct {
	Options
	open       opener
	generation uint32 // of nf_tables, as the last Ensure left it; 0: not known
	early      bool   // the host chose iptables while there was no table of kube-proxy in nftables
	families   addr.Per[*family]
}

// family is what the driver knows of one family.
type family struct {
	left   Ruleset // what the last Ensure put in place
	tables map[Variant]*tables
	swept  []Place // the places that were desired when the leftovers in iptables-legacy were removed
}

func newDriver(o Options, open opener) *driver {
	d := &driver{Options: o, open: open}
	for _, f := range addr.Families() {
		d.families.Set(f, &family{tables: map[Variant]*tables{}})
	}
	return d
}

// Ensure implements Driver. While nf_tables is of the generation in which the last Ensure left it, rules that are
// desired as before are in place.
func (d *driver) Ensure(ctx context.Context, desired addr.Per[Ruleset]) (Result, error) {
	var all Result
	var errs []error
	now, _ := generation() // 0 of a kernel without nf_tables
	known := now != 0 && now == d.generation
	d.generation = now
	for _, f := range addr.Families() {
		if d.early && !known && kubeProxyNFT(f) {
			d.early, all.ChooseAgain = false, true
		}
		rs, fam := desired.Get(f), d.families.Get(f)
		rs.Family = f
		res, err := d.ensure(ctx, fam, rs, !known || !rs.sameRules(fam.left))
		fam.left = rs
		all.Drifts = append(all.Drifts, res.Drifts...)
		all.NoSets = cmp.Or(all.NoSets, res.NoSets)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
		}
	}
	contested := slices.ContainsFunc(all.Drifts, func(d Drift) bool { return d.Kind == JumpContested })
	if contested || all.NoSets != nil || len(errs) > 0 { // not all is as desired: the next time it is compared again
		d.generation = 0
	}
	return all, errors.Join(errs...)
}

func (d *driver) ensure(ctx context.Context, fam *family, rs Ruleset, full bool) (res Result, err error) {
	variants := []Variant{d.Variant}
	if d.Kind == KindNFTables {
		if res.Drifts, err = d.ensureOwnTable(rs, fam.left, full); err != nil {
			return res, err
		}
		variants, rs = []Variant{VariantNFT, VariantLegacy}, rs.forwardOnly()
	}
	kept := map[bool][]Place{} // by whether it is iptables-legacy
	for _, v := range variants {
		if len(rs.Chains) == 0 { // a family not in use needs no program
			break
		}
		t, err := d.tablesOf(ctx, fam, rs.Family, v)
		if err != nil {
			return res, err
		}
		if t == nil {
			kept[v == VariantLegacy] = rs.places() // what can't be written stays as it is
			continue
		}
		kept[t.legacy] = rs.places()
		if err := d.ensureTables(ctx, t, rs, full, &res); err != nil {
			delete(fam.tables, v) // the program may have become another one
			return res, err
		}
	}
	if full {
		err = d.sweep(ctx, fam, rs, kept, &res)
	}
	return res, err
}

// ensureTables makes the chains in the tables of iptables the desired ones, and the sets that they match on.
func (d *driver) ensureTables(ctx context.Context, t *tables, rs Ruleset, full bool, res *Result) error {
	setsChanged := false
	for _, s := range rs.Sets {
		if d.Sets == nil {
			break
		}
		changed, err := d.Sets.Ensure(s.Name, rs.Family, s.Networks, s.Members)
		if err != nil {
			res.NoSets = err
			rs = rs.without(s.Name)
		} else if changed > 0 {
			setsChanged = true
			res.Drifts = append(res.Drifts, Drift{rs.Family, postRouting(), SetChanged}) // only rules there match on a set
		}
	}
	if !full && !t.legacy {
		return nil
	}
	if t.noSets == nil || setsChanged || time.Since(t.refused) >= setsAgain {
		found, err := t.ensure(ctx, rs.Chains)
		if !errors.Is(err, ErrSet) {
			t.noSets = nil
			res.Drifts = append(res.Drifts, found...)
			return err
		}
		t.noSets, t.refused = err, time.Now()
	}
	res.NoSets = t.noSets
	found, err := t.ensure(ctx, rs.without(setNames(rs.Family)...).Chains)
	res.Drifts = append(res.Drifts, found...)
	return err
}

// setsAgain is after what time rules that match on a set are tried again, where iptables rejected them: each try is a
// process, and a kernel without the match seldom gets it.
const setsAgain = 5 * time.Minute

// tablesOf opens the tables of a variant. There are none, on nftables, where nothing in them needs our accepts.
func (d *driver) tablesOf(ctx context.Context, fam *family, f addr.Family, v Variant) (*tables, error) {
	drops := false
	if d.Kind == KindNFTables {
		var there bool
		var err error
		if there, drops, err = forwardChain(f, v); err != nil || !there {
			return nil, err
		}
	}
	if t := fam.tables[v]; t != nil {
		return t, nil
	}
	t, err := d.open(ctx, f, v)
	switch missing := d.Kind == KindNFTables && errors.Is(err, exec.ErrNotFound); {
	case missing && drops:
		return nil, fmt.Errorf("the FORWARD chain of iptables-nft drops by default, and the program is missing "+
			"that could accept the pods' packets in it: %w", err)
	case missing:
		return nil, nil
	case err != nil:
		return nil, err
	}
	fam.tables[v] = t
	return t, nil
}

// forwardChain tells whether a variant has a FORWARD chain, and whether its policy is known to be DROP.
func forwardChain(f addr.Family, v Variant) (there, drops bool, err error) {
	if v == VariantLegacy {
		names, err := legacyNames(f)
		return slices.Contains(names, string(Filter)), false, err
	}
	c, err := findChain(f, string(Filter), string(Forward))
	return c != nil, c != nil && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop, err
}

// sweep removes what is not desired, what other drivers left included: last, so that packets are never without rules.
// What is in nf_tables is found without a process. iptables-legacy is examined once for the same desired places.
func (d *driver) sweep(ctx context.Context, fam *family, rs Ruleset, kept map[bool][]Place, res *Result) error {
	besides := func(kept []Place) []Place {
		return slices.DeleteFunc(Places(), func(p Place) bool { return slices.Contains(kept, p) })
	}
	found, err := removeNFT(rs.Family, besides(kept[false]))
	var more []Drift
	if err == nil && d.Kind != KindNFTables {
		more, err = removeOwnTable(rs.Family)
		found = append(found, more...)
	}
	if err == nil && (fam.swept == nil || !slices.Equal(fam.swept, rs.places())) {
		if more, err = removeLegacy(ctx, rs.Family, besides(kept[true]), d.open); err == nil {
			fam.swept = rs.places()
		}
		found = append(found, more...)
	}
	res.Drifts = append(res.Drifts, found...)
	if err != nil {
		return fmt.Errorf("leftovers: %w", err)
	}
	return dropSets(d.Sets, rs)
}

// Remove takes everything of ours out of every firewall, and the sets, and nothing else.
func Remove(ctx context.Context, sets Sets) error { return remove(ctx, sets, openTables(lockWait)) }

func remove(ctx context.Context, sets Sets, open opener) error {
	var errs []error
	for _, f := range addr.Families() {
		_, inNFT := removeNFT(f, Places())
		_, inLegacy := removeLegacy(ctx, f, Places(), open)
		_, inOwn := removeOwnTable(f)
		if err := errors.Join(inNFT, inLegacy, inOwn, dropSets(sets, Ruleset{Family: f})); err != nil {
			errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
		}
	}
	return errors.Join(errs...)
}

// dropSets removes the sets that no rule of the ruleset names.
func dropSets(sets Sets, rs Ruleset) error {
	if sets == nil {
		return nil
	}
	var errs []error
	for _, name := range setNames(rs.Family) {
		if !slices.ContainsFunc(rs.Sets, func(s Set) bool { return s.Name == name }) {
			errs = append(errs, sets.Remove(name))
		}
	}
	return errors.Join(errs...)
}
