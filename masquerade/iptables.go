package masquerade

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// iptablesDriver keeps the rules of one family in the tables of iptables, with sets of the kernel beside them.
type iptablesDriver struct {
	variant Variant
	open    opener
	sets    Sets // nil: another program keeps them
	tables  *tables
	swept   []Place // the places that were desired when the leftovers were removed
}

func (d *iptablesDriver) ensure(ctx context.Context, rs Ruleset, full bool) (res Result, err error) {
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

func (d *iptablesDriver) ensureChains(ctx context.Context, rs Ruleset, full bool) (res Result, err error) {
	if d.tables == nil {
		if d.tables, err = d.open(rs.Family, d.variant); err != nil {
			return res, err
		}
	}
	for _, s := range rs.Sets {
		if d.sets == nil {
			break
		}
		changed, err := d.sets.Ensure(s.Name, rs.Family, s.Networks, s.Members)
		if changed > 0 {
			res.Drifts = append(res.Drifts, Drift{rs.Family, postRouting(), SetChanged}) // only rules there match on a set
		}
		if err != nil {
			res.NoSets = err
			rs = rs.without(s.Name)
		}
	}
	if !full && !d.tables.legacy {
		return res, nil
	}
	found, err := d.tables.ensure(ctx, rs.Chains)
	if errors.Is(err, ErrSet) {
		res.NoSets = err
		found, err = d.tables.ensure(ctx, rs.without(setNames(rs.Family)...).Chains)
	}
	res.Drifts = append(res.Drifts, found...)
	return res, err
}

// sweep removes what is not desired, the rules of the other drivers included, once: last, so that the packets are never
// without rules.
func (d *iptablesDriver) sweep(ctx context.Context, rs Ruleset) (found []Drift, err error) {
	places := rs.places()
	if d.swept != nil && slices.Equal(d.swept, places) {
		return nil, nil
	}
	own := d.variant
	if t := d.tables; t != nil {
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
	d.swept = places
	return found, nil
}
