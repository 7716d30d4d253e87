package netstate

import "slices"

// patch changes a state in place: what is in gone goes, if it is there exactly so, and what is in come is there, in the place of
// what had its key. It returns what of the state is no more and what is new, so that a Diff of the two has all that has changed. All three
// are in order.
//
// It looks each object up, and moves what stands behind the first of those that come or go; nothing else depends on the size of the state.
func (s *State) patch(gone, come State) (was, is State) {
	s.Links, was.Links, is.Links = patch(s.Links, gone.Links, come.Links)
	s.Sysctls, was.Sysctls, is.Sysctls = patch(s.Sysctls, gone.Sysctls, come.Sysctls)
	s.Addresses, was.Addresses, is.Addresses = patch(s.Addresses, gone.Addresses, come.Addresses)
	s.Neighbours, was.Neighbours, is.Neighbours = patch(s.Neighbours, gone.Neighbours, come.Neighbours)
	s.FDB, was.FDB, is.FDB = patch(s.FDB, gone.FDB, come.FDB)
	s.Routes, was.Routes, is.Routes = patch(s.Routes, gone.Routes, come.Routes)
	s.Rules, was.Rules, is.Rules = patch(s.Rules, gone.Rules, come.Rules)
	return was, is
}

func patch[T object[T]](list, gone, come []T) (out, was, is []T) {
	var free []int // places in the list
	for _, g := range gone {
		i, ok := slices.BinarySearchFunc(list, g, T.Compare)
		if _, stays := find(come, g); ok && list[i] == g && !stays {
			free, was = append(free, i), append(was, g)
		}
	}
	var added []T
	for _, c := range come {
		i, ok := slices.BinarySearchFunc(list, c, T.Compare)
		switch {
		case !ok:
			added, is = append(added, c), append(is, c)
		case list[i] != c:
			was, is = append(was, list[i]), append(is, c)
			list[i] = c
		}
	}
	sortByKey(was)
	return splice(list, free, added), was, is
}

// splice takes out the elements at some places and puts in others, all in order: a merge in place, which moves what lies between two
// changes as a whole.
func splice[T object[T]](list []T, free []int, added []T) []T {
	for i, at := range free { // to the left, from the left
		next := len(list)
		if i+1 < len(free) {
			next = free[i+1]
		}
		copy(list[at-i:], list[at+1:next])
	}
	end := len(list) - len(free)
	clear(list[end:])
	list = append(list[:end], added...)
	for i := len(added) - 1; i >= 0; i-- { // to the right, from the right
		at, _ := slices.BinarySearchFunc(list[:end], added[i], T.Compare)
		copy(list[at+i+1:], list[at:end])
		list[at+i] = added[i]
		end = at
	}
	return list
}

// clone shares nothing with the state.
func (s *State) clone() State {
	return State{
		Links: slices.Clone(s.Links), Sysctls: slices.Clone(s.Sysctls), Addresses: slices.Clone(s.Addresses),
		Neighbours: slices.Clone(s.Neighbours), FDB: slices.Clone(s.FDB), Routes: slices.Clone(s.Routes), Rules: slices.Clone(s.Rules),
	}
}

// equal compares two states in order.
func (s *State) equal(o *State) bool {
	return slices.Equal(s.Links, o.Links) && slices.Equal(s.Sysctls, o.Sysctls) && slices.Equal(s.Addresses, o.Addresses) &&
		slices.Equal(s.Neighbours, o.Neighbours) && slices.Equal(s.FDB, o.FDB) && slices.Equal(s.Routes, o.Routes) &&
		slices.Equal(s.Rules, o.Rules)
}

// size is the number of objects.
func (s *State) size() int {
	return len(s.Links) + len(s.Sysctls) + len(s.Addresses) + len(s.Neighbours) + len(s.FDB) + len(s.Routes) + len(s.Rules)
}
