package netstate

import (
	"fmt"
	"slices"

	"github.com/overlayd/overlayd/internal/sorted"
)

// Op is what is to be done with an object.
type Op uint8

// The operations. Replace is an Add of an object whose key is there with another content.
const (
	Add Op = iota + 1
	Replace
	Delete
)

func (o Op) String() string {
	return map[Op]string{Add: "add", Replace: "replace", Delete: "delete"}[o]
}

// Object is any of the values that a State is made of.
type Object interface {
	fmt.Stringer
	kind() kind
}

// Change is one step from one state to another.
type Change struct {
	Op  Op
	Obj Object // what there is to be, or, for a Delete, what is to go
	Old Object // what is there under its key, or was deleted for its sake; nil: nothing
}

func (c Change) String() string { return c.Op.String() + " " + c.Obj.String() }

// withoutPruning leaves what is there alone: it has no deletions, but for that of a device in the place of another, and
// leaves the paths to peers as they are.
func withoutPruning(all []Change) []Change {
	made := map[string]bool{}
	for _, c := range all {
		if l, ok := c.Obj.(Link); ok && c.Op == Add {
			made[l.Name] = true
		}
	}
	return reject(all, func(c Change) bool {
		l, ok := c.Obj.(Link)
		switch c.Obj.(type) {
		case Neighbour, FDBEntry, TunnelPeer, Route:
			if c.Old != nil { // what is there may be newer than what is desired
				return true
			}
		}
		return c.Op == Delete && (!ok || !made[l.Name])
	})
}

// Kind names the sort of object that the change is about: "route", "fdb" and so on.
func (c Change) Kind() string { return string(c.Obj.kind()) }

type kind string

const (
	kindLink       kind = "device"
	kindSysctl     kind = "sysctl"
	kindAddress    kind = "address"
	kindNeighbour  kind = "neighbour"
	kindFDB        kind = "fdb"
	kindTunnelPeer kind = "peer"
	kindRoute      kind = "route"
	kindRule       kind = "rule"
)

func (Link) kind() kind       { return kindLink }
func (Sysctl) kind() kind     { return kindSysctl }
func (Address) kind() kind    { return kindAddress }
func (Neighbour) kind() kind  { return kindNeighbour }
func (FDBEntry) kind() kind   { return kindFDB }
func (TunnelPeer) kind() kind { return kindTunnelPeer }
func (Route) kind() kind      { return kindRoute }
func (Rule) kind() kind       { return kindRule }

type object[T any] interface {
	sorted.Element[T]
	Object
}

// Diff lists the changes that make actual equal to desired, in an order that can be carried out: what others need comes
// first, and nothing is deleted before all that is new is there. Only a device that can't be changed into the
// desired one has to go first, then everything on it counts as gone; and a route that hides the next one's gateway.
func Diff(actual, desired State) []Change {
	var links, gone []Change
	diff(actual.Links, desired.Links, &links, &gone)
	var doomed []Change
	for i, c := range links {
		if c.Op == Replace && c.Old.(Link).VXLAN != c.Obj.(Link).VXLAN {
			doomed = append(doomed, Change{Op: Delete, Obj: c.Old})
			links[i] = Change{Op: Add, Obj: c.Obj}
			actual = actual.withoutLink(c.Old.(Link).Name)
		}
	}
	entries := func(s State) int { return len(s.Neighbours) + len(s.FDB) + len(s.TunnelPeers) + len(s.Routes) }
	out := slices.Grow(doomed, len(links)+max(0, entries(desired)-entries(actual))) // so many are new at least
	out = append(out, links...)
	var obsolete [6][]Change
	diff(actual.Sysctls, desired.Sysctls, &out, new([]Change)) // a setting that is no longer desired stays as it is
	diff(actual.Addresses, desired.Addresses, &out, &obsolete[4])
	diff(actual.FDB, desired.FDB, &out, &obsolete[2])
	diff(actual.Neighbours, desired.Neighbours, &out, &obsolete[3])
	diff(actual.TunnelPeers, desired.TunnelPeers, &out, &obsolete[5])
	routes := len(out)
	diff(actual.Routes, desired.Routes, &out, &obsolete[1])
	if i := slices.IndexFunc(out[routes:], hidesGateway); i >= 0 {
		rest := slices.Clone(out[routes+i:])
		out = out[:routes+i]
		for _, c := range rest {
			if hidesGateway(c) {
				out = append(out, Change{Op: Delete, Obj: c.Old})
				c.Op = Add
			}
			out = append(out, c)
		}
	}
	diff(actual.Rules, desired.Rules, &out, &obsolete[0])
	for _, o := range obsolete {
		out = append(out, o...)
	}
	return append(out, gone...)
}

// hidesGateway reports whether the IPv6 stack refuses to replace a route: it looks for the gateway of the new one by the
// old one, and finds it on another device, onlink or not.
func hidesGateway(c Change) bool {
	if c.Op != Replace {
		return false
	}
	was, is := c.Old.(Route), c.Obj.(Route)
	return was.Dst.Contains(is.Via) && is.Via.Is6() && was.Link != is.Link
}

// diff walks two sorted lists side by side.
func diff[T object[T]](actual, desired []T, todo, obsolete *[]Change) {
	for len(actual) > 0 || len(desired) > 0 {
		if n := common(actual, desired); n > 0 {
			actual, desired = actual[n:], desired[n:]
			continue
		}
		var c int
		switch {
		case len(actual) == 0:
			c = 1
		case len(desired) == 0:
			c = -1
		default:
			c = actual[0].Compare(desired[0])
		}
		switch {
		case c < 0:
			*obsolete = append(*obsolete, Change{Op: Delete, Obj: actual[0]})
			actual = actual[1:]
		case c > 0:
			*todo = append(*todo, Change{Op: Add, Obj: desired[0]})
			desired = desired[1:]
		default:
			n := 1 // of what is there under this key: more than one if another program appended a route to ours
			for n < len(actual) && actual[n].Compare(desired[0]) == 0 {
				n++
			}
			same := actual[:n]
			if !slices.Contains(same, desired[0]) {
				*todo = append(*todo, Change{Op: Replace, Obj: desired[0], Old: same[0]})
				same = same[1:]
			}
			for _, o := range same {
				if o != desired[0] {
					*obsolete = append(*obsolete, Change{Op: Delete, Obj: o})
				}
			}
			actual, desired = actual[n:], desired[1:]
		}
	}
}

// common is how many of the first objects are the same on both sides, and have no others of their keys behind them.
func common[T object[T]](actual, desired []T) int {
	n := 0
	for n < len(actual) && n < len(desired) && actual[n] == desired[n] {
		n++
	}
	if n > 0 && n < len(actual) && actual[n].Compare(desired[n-1]) == 0 {
		n--
	}
	return n
}

// withoutLink is the state without everything that goes when a device goes. Rules and settings are not on a device.
func (s State) withoutLink(name string) State {
	s.Addresses = reject(s.Addresses, func(a Address) bool { return a.Link == name })
	s.Neighbours = reject(s.Neighbours, func(n Neighbour) bool { return n.Link == name })
	s.FDB = reject(s.FDB, func(e FDBEntry) bool { return e.Link == name })
	s.TunnelPeers = reject(s.TunnelPeers, func(p TunnelPeer) bool { return p.Link == name })
	s.Routes = reject(s.Routes, func(r Route) bool { return r.Link == name })
	return s
}

func reject[T any](s []T, match func(T) bool) []T {
	var out []T
	for _, x := range s {
		if !match(x) {
			out = append(out, x)
		}
	}
	return out
}
