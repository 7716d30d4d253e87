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
	// Ensure makes the firewall hold exactly these rulesets, at most one of each family; a family that is not among
	// them gets nothing. One family's error does not hold back the other; what is in the result beside an error has
	// been repaired all the same. What another driver left behind goes as soon as the new rules are in place.
	//
	// Where full is false, only that is compared of whose changes the kernel notifies nobody: tables of
	// iptables-legacy, and address sets. The caller asks for that when the last Ensure of these rulesets succeeded and
	// no notification has come since.
	Ensure(ctx context.Context, desired []Ruleset, full bool) (Result, error)
	// Remove takes everything of ours out of the firewall, also what another driver put there, and nothing else.
	Remove(ctx context.Context) error
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
type DriftKind uint8

// The kinds of drift.
const (
	ChainMissing  DriftKind = iota + 1 // our chain is missing or empty
	RulesChanged                       // our chain holds other rules, or in another order
	JumpMissing                        // nothing calls our chain
	JumpMisplaced                      // the jump to our chain does not stand where it belongs
	JumpContested                      // the same, and left so: it was moved too often
	JumpRepeated                       // our chain is called more than once
	JumpChanged                        // our chain is called by another rule than the daemon's
	SetChanged                         // a set holds other members
	Leftover                           // a chain of ours that is not desired
	Unverified                         // rules of an earlier daemon: they were written again
)

func (k DriftKind) String() string {
	switch k {
	case ChainMissing:
		return "chain missing"
	case RulesChanged:
		return "rules changed"
	case JumpMissing:
		return "jump missing"
	case JumpMisplaced:
		return "jump misplaced"
	case JumpContested:
		return "jump contested"
	case JumpRepeated:
		return "jump repeated"
	case JumpChanged:
		return "jump changed"
	case SetChanged:
		return "set changed"
	case Leftover:
		return "left over"
	case Unverified:
		return "of an earlier daemon"
	}
	return fmt.Sprintf("DriftKind(%d)", uint8(k))
}

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

// byFamily checks what the types cannot say: each family once, only chains that are ours, each once. A family without a
// ruleset gets an empty one.
func byFamily(rulesets []Ruleset) (addr.Per[Ruleset], error) {
	desired := addr.Per[Ruleset]{V4: Ruleset{Family: addr.IPv4}, V6: Ruleset{Family: addr.IPv6}}
	var seen addr.Per[bool]
	for _, rs := range rulesets {
		if !slices.Contains([]addr.Family{addr.IPv4, addr.IPv6}, rs.Family) || seen.Get(rs.Family) {
			return desired, fmt.Errorf("a ruleset of no family, or a second one of the same: %s", rs.Family)
		}
		seen.Set(rs.Family, true)
		var places []Place
		for _, c := range rs.Chains {
			if slices.Contains(places, c.Place) || !slices.Contains(Places(), c.Place) {
				return desired, fmt.Errorf("%s: not one of our chains, or there twice: %v", rs.Family, c.Place)
			}
			places = append(places, c.Place)
		}
		desired.Set(rs.Family, rs)
	}
	return desired, nil
}

// eachFamily does for both families what is to be done for one.
func eachFamily(rulesets []Ruleset, ensure func(Ruleset) (Result, error)) (Result, error) {
	desired, err := byFamily(rulesets)
	if err != nil {
		return Result{}, err
	}
	var all Result
	var errs []error
	for _, f := range addr.Families() {
		res, err := ensure(desired.Get(f))
		all.Drifts = append(all.Drifts, res.Drifts...)
		all.NoSets = cmp.Or(all.NoSets, res.NoSets)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
		}
	}
	return all, errors.Join(errs...)
}

// removeAll takes everything of ours out of the tables of iptables and out of nftables, and removes the sets.
func removeAll(ctx context.Context, sets Sets, open opener) error {
	var errs []error
	for _, f := range addr.Families() {
		_, inNFT := removeIPTables(ctx, f, Places(), VariantNFT, open)
		_, inLegacy := removeIPTables(ctx, f, Places(), VariantLegacy, open)
		if err := errors.Join(inNFT, inLegacy, removeOwnTable(f), dropSets(sets, Ruleset{Family: f})); err != nil {
			errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
		}
	}
	return errors.Join(errs...)
}
