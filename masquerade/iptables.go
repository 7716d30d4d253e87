package masquerade

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"

	"github.com/overlayd/overlayd/addr"
)

// IPTables is the Driver on iptables and ip6tables.
type IPTables struct {
	variant Variant
	open    opener
	sets    Sets // nil: another program keeps them
	tables  addr.Per[*tables]
	swept   addr.Per[[]Place] // the places that were desired when the leftovers were removed
}

var _ Driver = (*IPTables)(nil)

// Ensure implements Driver.
func (d *IPTables) Ensure(ctx context.Context, desired []Ruleset, full bool) (Result, error) {
	return eachFamily(desired, func(rs Ruleset) (Result, error) { return d.ensureFamily(ctx, rs, full) })
}

// Remove implements Driver.
func (d *IPTables) Remove(ctx context.Context) error {
	d.tables, d.swept = addr.Per[*tables]{}, addr.Per[[]Place]{}
	return removeAll(ctx, d.sets, d.open)
}

func (d *IPTables) ensureFamily(ctx context.Context, rs Ruleset, full bool) (res Result, err error) {
	if len(rs.Chains) > 0 { // a family not in use needs no program
		if res, err = d.ensureChains(ctx, rs, full); err != nil {
			return res, err
		}
	}
	if !full {
		return res, nil
	}
	found, err := d.sweep(ctx, rs)
	res.Drifts = append(res.Drifts, found...)
	return res, errors.Join(err, dropSets(d.sets, rs))
}

func (d *IPTables) ensureChains(ctx context.Context, rs Ruleset, full bool) (res Result, err error) {
	t := d.tables.Get(rs.Family)
	if t == nil {
		if t, err = d.open(rs.Family, d.variant); err != nil {
			return res, err
		}
		d.tables.Set(rs.Family, t)
	}
	for _, s := range rs.Sets {
		changed, err := d.fill(rs.Family, s)
		if changed > 0 {
			res.Drifts = append(res.Drifts, Drift{rs.Family, postRouting(), SetChanged}) // only rules there match on a set
		}
		if err != nil {
			res.NoSets = err
			rs = rs.without(s.Name)
		}
	}
	if !full && !t.legacy {
		return res, nil
	}
	found, err := t.ensure(ctx, rs.Chains)
	if errors.Is(err, ErrSet) {
		res.NoSets = err
		found, err = t.ensure(ctx, rs.without(setNames(rs.Family)...).Chains)
	}
	res.Drifts = append(res.Drifts, found...)
	return res, err
}

func (d *IPTables) fill(f addr.Family, s Set) (changed int, err error) {
	if d.sets == nil {
		return 0, nil
	}
	return d.sets.Ensure(s.Name, f, s.Networks, s.Members)
}

// sweep removes what is not desired, the rules of the other drivers included, once: last, so that the packets are never
// without rules.
func (d *IPTables) sweep(ctx context.Context, rs Ruleset) (found []Drift, err error) {
	places := rs.places()
	if swept := d.swept.Get(rs.Family); swept != nil && slices.Equal(swept, places) {
		return nil, nil
	}
	own := d.variant
	if t := d.tables.Get(rs.Family); t != nil {
		own = map[bool]Variant{true: VariantLegacy, false: VariantNFT}[t.legacy]
		maps.DeleteFunc(t.written, func(p Place, _ written) bool { return !slices.Contains(places, p) })
	}
	for _, v := range []Variant{VariantNFT, VariantLegacy} {
		undesired := Places()
		if v == own {
			undesired = slices.DeleteFunc(undesired, func(p Place) bool { return slices.Contains(places, p) })
		}
		more, err := removeIPTables(ctx, rs.Family, undesired, v, d.open)
		if err != nil {
			return found, fmt.Errorf("leftovers in iptables-%s: %w", v, err)
		}
		if v == own { // of the other variant nothing was expected
			found = append(found, more...)
		}
	}
	if err := removeOwnTable(rs.Family); err != nil {
		return found, fmt.Errorf("leftovers in nftables: %w", err)
	}
	d.swept.Set(rs.Family, places)
	return found, nil
}

// dropSets removes the sets that no rule names any more.
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

// missing tells whether the program of iptables was not found.
func missing(err error) bool { return errors.Is(err, exec.ErrNotFound) }
