package masquerade

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/overlayd/overlayd/addr"
)

// Driver makes a firewall equal to rulesets. It belongs to one goroutine.
type Driver interface {
	// Ensure makes the firewall hold exactly these rulesets. One family's error does not hold back the other; what is in
	// the result beside an error has been repaired all the same. What another driver left behind goes as soon as the new
	// rules are in place.
	//
	// Where full is false, only that is compared which the kernel sends no notifications for: tables of iptables-legacy,
	// and address sets. The caller asks for that when the last Ensure of these rulesets succeeded and
	// no notification has come since.
	Ensure(ctx context.Context, desired addr.Per[Ruleset], full bool) (Result, error)
}

// Result is what Ensure has done.
type Result struct {
	// Drifts is what differed and has been repaired: nothing, if all was in place.
	Drifts []Drift
	// NoSets says why rules that match on a set had to be left out. These packets are then masqueraded: not what is
	// promised, but they arrive.
	NoSets error
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

// families is the Driver that has one for each family.
type families addr.Per[driver]

// driver is a kind of firewall for one family.
type driver interface {
	ensure(ctx context.Context, rs Ruleset, full bool) (Result, error)
}

// Ensure implements Driver.
func (d families) Ensure(ctx context.Context, desired addr.Per[Ruleset], full bool) (Result, error) {
	var all Result
	var errs []error
	for _, f := range addr.Families() {
		rs := desired.Get(f)
		rs.Family = f
		res, err := addr.Per[driver](d).Get(f).ensure(ctx, rs, full)
		all.Drifts = append(all.Drifts, res.Drifts...)
		all.NoSets = cmp.Or(all.NoSets, res.NoSets)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
		}
	}
	return all, errors.Join(errs...)
}

// Remove takes everything of ours out of every firewall, and the sets, and nothing else.
func Remove(ctx context.Context, sets Sets) error { return remove(ctx, sets, openTables(lockWait)) }

func remove(ctx context.Context, sets Sets, open opener) error {
	var errs []error
	for _, f := range addr.Families() {
		_, inNFT := removeNFT(f, Places())
		_, inLegacy := removeLegacy(ctx, f, Places(), open)
		if err := errors.Join(inNFT, inLegacy, removeOwnTable(f), dropSets(sets, Ruleset{Family: f})); err != nil {
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
