// Package sorted works on lists that are in the order of a key, each key once.
package sorted

import "slices"

// Element is what such a list is made of. Compare orders elements by key.
type Element[T any] interface {
	comparable
	Compare(T) int
}

// Sort brings a list into order.
func Sort[T Element[T]](list []T) {
	if !slices.IsSortedFunc(list, T.Compare) {
		slices.SortFunc(list, T.Compare)
	}
}

// Find looks up the element with the key of another one.
func Find[T Element[T]](list []T, key T) (T, bool) {
	i, ok := slices.BinarySearchFunc(list, key, T.Compare)
	if !ok {
		var none T
		return none, false
	}
	return list[i], true
}

// Patch changes a list in place: what is in gone goes, if it is there exactly so, and what is in come is there, in the
// place of what had its key. It returns the list, what of it is no more, and what is new. All are in order.
//
// It looks each element up, and moves what stands behind the first of those that come or go; nothing else depends on
// the size of the list.
func Patch[T Element[T]](list, gone, come []T) (out, was, is []T) {
	var free []int // places in the list
	for _, g := range gone {
		i, ok := slices.BinarySearchFunc(list, g, T.Compare)
		if _, stays := Find(come, g); ok && list[i] == g && !stays {
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
	Sort(was)
	return splice(list, free, added), was, is
}

// splice takes out the elements at some places and puts in others, all in order: a merge in place, which moves what
// lies between two changes as a whole.
func splice[T Element[T]](list []T, free []int, added []T) []T {
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
