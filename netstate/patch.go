package netstate

import "github.com/overlayd/overlayd/internal/sorted"

// patch changes a state in place, see sorted.Patch. It returns what of the state is no more and what is new, so that a
// Diff of the two has all that has changed. All three are in order.
func (s *State) patch(gone, come State) (was, is State) {
	s.Links, was.Links, is.Links = sorted.Patch(s.Links, gone.Links, come.Links)
	s.Sysctls, was.Sysctls, is.Sysctls = sorted.Patch(s.Sysctls, gone.Sysctls, come.Sysctls)
	s.Addresses, was.Addresses, is.Addresses = sorted.Patch(s.Addresses, gone.Addresses, come.Addresses)
	s.Neighbours, was.Neighbours, is.Neighbours = sorted.Patch(s.Neighbours, gone.Neighbours, come.Neighbours)
	s.FDB, was.FDB, is.FDB = sorted.Patch(s.FDB, gone.FDB, come.FDB)
	s.TunnelPeers, was.TunnelPeers, is.TunnelPeers = sorted.Patch(s.TunnelPeers, gone.TunnelPeers, come.TunnelPeers)
	s.Routes, was.Routes, is.Routes = sorted.Patch(s.Routes, gone.Routes, come.Routes)
	s.Rules, was.Rules, is.Rules = sorted.Patch(s.Rules, gone.Rules, come.Rules)
	return was, is
}
