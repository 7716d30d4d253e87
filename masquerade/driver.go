package masquerade

import (
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
	// them gets nothing. One family's error does not hold back the other; what is in the result beside an error has been
	// put right all the same. What another driver left behind goes as soon as the new rules are in place.
	Ensure(ctx context.Context, want []Ruleset) (Result, error)
	// Remove takes everything of ours out of the firewall, also what another driver put there, and nothing else.
	Remove(ctx context.Context) error
	// Notified tells whether the last Ensure left nothing that could change without the Watch hearing of it. While it is
	// false, only looking on a period finds what others do.
	Notified() bool
}

// Result is what Ensure has done.
type Result struct {
	// Drifts is what was found otherwise and has been put right: nothing, if all was in place.
	Drifts []Drift
	// NoSets says why rules that look into a set had to be left out. These packets are then masqueraded: not what is
	// promised, but they arrive.
	NoSets error
}

func (r *Result) add(more Result) {
	r.Drifts = append(r.Drifts, more.Drifts...)
	r.NoSets = errors.Join(r.NoSets, more.NoSets)
}

// Sets keeps named sets of addresses or networks in the kernel, for a firewall that has none of its own. A set has to
// exist before a rule names it, and cannot be removed before the rule is.
type Sets interface {
	// Ensure makes the set hold exactly these members; it returns how many changes were made for it.
	Ensure(name string, f addr.Family, networks bool, members []netip.Prefix) (changed int, err error)
	// Remove removes the set; that there is none is fine.
	Remove(name string) error
}

// Kernel reads what is in the firewall, most of it in nf_tables, without a process. What is not there is an error that is
// os.ErrNotExist.
type Kernel interface {
	// Table tells how many chains, sets and other objects are in a table, and whether it is plain: without flags.
	Table(f addr.Family, table string) (objects int, plain bool, err error)
	// Chain says what makes a chain a base chain, "type nat hook postrouting priority 100 policy accept", and nothing of one
	// that only other chains call.
	Chain(f addr.Family, table, chain string) (base string, err error)
	// Rules returns the rules of a chain, or of all chains in the table if none is named, as the words that `iptables -S`
	// prints, without quotes. What is not known there is a word that begins with a question mark.
	Rules(f addr.Family, table, chain string) ([][]string, error)
	// Set returns the kind of a set, "ipv4_addr" or, for networks, "ipv4_addr interval", and its members, sorted.
	Set(f addr.Family, table, set string) (kind string, members []netip.Prefix, err error)
	// LegacyTable returns a number that changes with every change of a table of iptables-legacy, which has to exist.
	LegacyTable(f addr.Family, table string) (uint64, error)
}

// noKernel stands for a kernel that cannot be asked.
type noKernel struct{}

func (noKernel) Table(addr.Family, string) (int, bool, error) { return 0, false, errNoKernel }

func (noKernel) Chain(addr.Family, string, string) (string, error) { return "", errNoKernel }

func (noKernel) Rules(addr.Family, string, string) ([][]string, error) { return nil, errNoKernel }

func (noKernel) Set(addr.Family, string, string) (string, []netip.Prefix, error) {
	return "", nil, errNoKernel
}

func (noKernel) LegacyTable(addr.Family, string) (uint64, error) { return 0, errNoKernel }

var errNoKernel = errors.New("nf_tables cannot be read")

// Watch hears of changes in the firewall that Concerns is true for.
type Watch interface {
	// Epoch grows with every change, those included that were complete before the call; false when nothing is heard.
	Epoch() (epoch uint64, ok bool)
	// Settled says that the changes up to this epoch need no wake any more.
	Settled(epoch uint64)
}

// Concerns tells whether a change in nf_tables may be one of ours, or in the way of ours: for a Watch. The chain is
// empty where it is not known, or the change is to the table itself.
func Concerns(table, chain string) bool {
	if table == nftTableName {
		return true
	}
	return slices.ContainsFunc(placeList(), func(p Place) bool {
		return table == string(p.Table) && (chain == "" || chain == string(p.Hook) || chain == p.Name)
	})
}

func placeList() []Place {
	p := Places()
	return p[:]
}

// DriftKind is a way in which the firewall can differ from what is wanted.
type DriftKind uint8

// The kinds of drift.
const (
	ChainMissing  DriftKind = iota + 1 // our chain is not there
	RulesChanged                       // our chain holds other rules, or in another order
	JumpMissing                        // nothing calls our chain
	JumpMisplaced                      // the call of our chain does not stand where it belongs
	JumpContested                      // the same, and left so: it was moved too often
	JumpRepeated                       // our chain is called more than once
	JumpChanged                        // our chain is called under conditions
	SetChanged                         // a set holds other members
	Leftover                           // a chain of ours that is not wanted
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
	}
	return fmt.Sprintf("DriftKind(%d)", uint8(k))
}

// Drift is one difference between the firewall and what was wanted.
type Drift struct {
	Family addr.Family
	Place  Place
	Kind   DriftKind
}

func (d Drift) String() string {
	return fmt.Sprintf("%s %s %s: %s", d.Family, d.Place.Table, d.Place.Name, d.Kind)
}

// byFamily checks what the types cannot say: each family once, only chains that are ours, each once. A family without a
// ruleset gets an empty one.
func byFamily(want []Ruleset) (addr.Per[Ruleset], error) {
	wanted := addr.Per[Ruleset]{V4: Ruleset{Family: addr.IPv4}, V6: Ruleset{Family: addr.IPv6}}
	var seen addr.Per[bool]
	for _, rs := range want {
		if !slices.Contains([]addr.Family{addr.IPv4, addr.IPv6}, rs.Family) || seen.Get(rs.Family) {
			return wanted, fmt.Errorf("a ruleset of no family, or a second one of the same: %s", rs.Family)
		}
		seen.Set(rs.Family, true)
		var places []Place
		for _, c := range rs.Chains {
			if slices.Contains(places, c.Place) || !slices.Contains(placeList(), c.Place) {
				return wanted, fmt.Errorf("%s: not one of our chains, or there twice: %v", rs.Family, c.Place)
			}
			places = append(places, c.Place)
		}
		wanted.Set(rs.Family, rs)
	}
	return wanted, nil
}

// eachFamily does for both families what is to be done for one.
func eachFamily(want []Ruleset, ensure func(Ruleset) (Result, error)) (Result, error) {
	wanted, err := byFamily(want)
	if err != nil {
		return Result{}, err
	}
	var all Result
	var errs []error
	for _, f := range addr.Families() {
		res, err := ensure(wanted.Get(f))
		all.add(res)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s firewall: %w", f, err))
		}
	}
	return all, errors.Join(errs...)
}
