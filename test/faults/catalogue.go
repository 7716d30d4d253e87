package faults

import "slices"

// Catalogue lists all rows. In the short form, some waits are shorter.
func Catalogue(short bool) []Fault {
	return slices.Concat(
		kernel(), firewall(), sources(), underlayFaults(), addresses(), etcdFaults(!short), boot(), daemon(), peers(),
		kubernetesFaults(),
	)
}
