package masquerade

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/overlayd/overlayd/addr"
)

// Driver makes a firewall equal to rulesets. It belongs to one goroutine.
type Driver interface {
	// Ensure makes the firewall hold exactly these rulesets, at most one of each family; a family that is not among
	// them gets nothing. It returns what was found otherwise and has been put right: nothing, if all was in place.
	// One family's error does not hold back the other; what is returned beside an error has been put right all the same.
	Ensure(ctx context.Context, want []Ruleset) ([]Drift, error)
	// Remove takes everything of ours out of the firewall, and nothing else.
	Remove(ctx context.Context) error
}

// Sets keeps named sets of addresses in the kernel, for Rule.DstSet. A set has to exist before a rule names it, and
// cannot be removed before the rule is.
type Sets interface {
	// Ensure makes the set hold exactly these members; it returns how many changes were made for it.
	Ensure(name string, f addr.Family, members []netip.Addr) (changed int, err error)
	// Remove removes the set; that there is none is fine.
	Remove(name string) error
}

// DriftKind is a way in which the firewall can differ from what is wanted.
type DriftKind uint8

// The kinds of drift.
const (
	ChainMissing  DriftKind = iota + 1 // our chain is not there
	RulesChanged                       // our chain holds other rules, or in another order
	JumpMissing                        // nothing calls our chain
	JumpMisplaced                      // something stands before the call of our chain
	JumpRepeated                       // our chain is called more than once
	JumpChanged                        // our chain is called under conditions
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
		return "jump not first"
	case JumpRepeated:
		return "jump repeated"
	case JumpChanged:
		return "jump changed"
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
