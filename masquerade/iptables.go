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
		if d.tables, err = d.open(ctx, rs.Family, d.variant); err != nil {
			return res, err
		}
	}
	for _, s := range rs.Sets {
		if d.sets == nil {
			break
		}
		changed, err := d.sets.Ensure(s.Name, rs.Family, s.Networks, s.Members)
		if changed > 0 && err == nil {
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
	if err != nil {
		d.tables = nil // the program may have become another one
	}
	return res, err
}

// sweep removes what is not desired, the rules of the other drivers included: last, so that the packets are never
// without rules. What is in nf_tables is found without a process. In iptables-legacy it is looked for once.
func (d *iptablesDriver) sweep(ctx context.Context, rs Ruleset) (found []Drift, err error) {
	places := rs.places()
	undesired := slices.DeleteFunc(Places(), func(p Place) bool { return slices.Contains(places, p) })
	legacy := d.variant == VariantLegacy
	if t := d.tables; t != nil {
		legacy = t.legacy
		maps.DeleteFunc(t.written, func(p Place, _ written) bool { return slices.Contains(undesired, p) })
	}
	inNFT, inLegacy := undesired, Places()
	if legacy {
		inNFT, inLegacy = Places(), undesired
	}
	if found, err = removeNFT(rs.Family, inNFT); err != nil {
		return found, fmt.Errorf("leftovers in iptables-nft: %w", err)
	}
	if err := removeOwnTable(rs.Family); err != nil {
		return found, fmt.Errorf("leftovers in nftables: %w", err)
	}
	if d.swept != nil && slices.Equal(d.swept, places) {
		return found, nil
	}
	more, err := removeLegacy(ctx, rs.Family, inLegacy, d.open)
	if err != nil {
		return found, fmt.Errorf("leftovers in iptables-legacy: %w", err)
	}
	d.swept = places
	return append(found, more...), nil
}
