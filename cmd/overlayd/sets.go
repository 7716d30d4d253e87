package main

import (
	"net/netip"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/masquerade"
	"github.com/overlayd/overlayd/netstate"
)

// newSets opens the kernel's address sets. A kernel without them is an error only for those who need one.
func newSets() masquerade.Sets {
	s, err := netstate.NewIPSets()
	if err != nil {
		return noSets{err}
	}
	return s
}

// noSets stands for a kernel without address sets.
type noSets struct{ err error }

func (n noSets) Ensure(string, addr.Family, bool, []netip.Prefix) (int, error) { return 0, n.err }
func (noSets) Remove(string) error                                             { return nil }
