package subnet

// flannels reports whether flannel wrote the entry: a node that leases a subnet without saying its name.
func (e *Entry) flannels() bool { return e.Err == nil && e.Backend != "" && e.Identity == (Identity{}) }

// HarmsFlannel lists the entries whose value is no JSON, where nodes of flannel lease subnets beside them. A running
// flanneld takes the event of such a key for the end of all leases: it drops its routes to every peer, and has each
// back only when that renews its lease.
func (t Table) HarmsFlannel() []*Entry {
	var bad []*Entry
	beside := false
	for _, e := range t.Entries {
		if e.NotJSON {
			bad = append(bad, e)
		}
		beside = beside || e.flannels()
	}
	if !beside {
		return nil
	}
	return bad
}
