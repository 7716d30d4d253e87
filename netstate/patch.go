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

// splice takes out the elements at some places and puts in others, all in order. What stays is moved once at most, and only if its place is
// another one.
func splice[T object[T]](list []T, free []int, added []T) []T {
	type run struct{ from, to, shift int }
	var runs []run
	places := make([]int, len(added))
	from, in, out := 0, 0, 0
	for in < len(added) || out < len(free) {
		next := len(list)
		if out < len(free) {
			next = free[out]
		}
		at := next
		if in < len(added) {
			at, _ = slices.BinarySearchFunc(list[from:], added[in], T.Compare)
			at += from
		}
		if in < len(added) && at <= next {
			runs = append(runs, run{from, at, in - out})
			places[in] = at + in - out
			from, in = at, in+1
		} else {
			runs = append(runs, run{from, next, in - out})
			from, out = next+1, out+1
		}
	}
	runs = append(runs, run{from, len(list), in - out})
	size := len(list) + in - out
	list = slices.Grow(list, max(0, in-out))[:max(size, len(list))]
	for _, r := range runs { // to the left, from the left
		if r.shift < 0 {
			copy(list[r.from+r.shift:], list[r.from:r.to])
		}
	}
	for _, r := range slices.Backward(runs) { // to the right, from the right
		if r.shift > 0 {
			copy(list[r.from+r.shift:], list[r.from:r.to])
		}
	}
	for i, place := range places {
		list[place] = added[i]
	}
	clear(list[size:])
	return list[:size]
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
