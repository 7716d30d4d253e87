package masquerade

import (
	"github.com/overlayd/overlayd/addr"
)

// maxRounds bounds how often one Ensure looks again after it put something right. Whoever keeps changing things meanwhile
// is dealt with at the next wake.
const maxRounds = 3

// memory knows which rulesets have been seen in place and when, so that nobody looks while nothing has changed. Without a
// Watch that hears it remembers nothing.
type memory struct {
	watch Watch
	seen  addr.Per[sighting]
}

type sighting struct {
	valid   bool // seen in place
	epoch   uint64
	want    Ruleset
	pending bool // was put right, and has to be seen
}

// epoch is to be asked before looking. False: what is seen cannot be relied on later.
func (m *memory) epoch() (uint64, bool) {
	if m.watch == nil {
		return 0, false
	}
	return m.watch.Epoch()
}

// unchanged tells whether the ruleset was seen in place and nothing has changed since.
func (m *memory) unchanged(rs Ruleset) bool {
	s := m.seen.Get(rs.Family)
	epoch, ok := m.epoch()
	return ok && s.valid && s.epoch == epoch && s.want.Equal(rs)
}

func (m *memory) forget(f addr.Family) { m.seen.Set(f, sighting{}) }

// current tells whether everything that was seen in place was so at the newest epoch.
func (m *memory) current() bool {
	epoch, ok := m.epoch()
	if !ok {
		return true // as far as can be known
	}
	for _, f := range addr.Families() {
		if s := m.seen.Get(f); s.pending || s.valid && s.epoch != epoch {
			return false
		}
	}
	return true
}

// complete tells whether both families have been seen in place, by a watch that still hears.
func (m *memory) complete() bool {
	_, ok := m.epoch()
	return ok && m.seen.V4.valid && m.seen.V6.valid
}

// look repairs what a look finds, and remembers if it finds nothing.
func (m *memory) look(rs Ruleset, repair func() ([]Drift, error)) ([]Drift, error) {
	if m.unchanged(rs) {
		return nil, nil
	}
	epoch, watched := m.epoch()
	drifts, err := repair()
	switch {
	case err != nil || !watched:
		m.forget(rs.Family)
	case len(drifts) > 0:
		m.seen.Set(rs.Family, sighting{pending: true})
	default:
		m.seen.Set(rs.Family, sighting{valid: true, epoch: epoch, want: rs})
	}
	return drifts, err
}

// rounds looks again after something was put right, so that what is remembered has been seen; and takes back the wakes
// for what has.
func (m *memory) rounds(ensure func() (Result, error)) (Result, error) {
	var all Result
	for range maxRounds {
		res, err := ensure()
		all.Drifts, all.NoSets = append(all.Drifts, res.Drifts...), res.NoSets
		if err != nil {
			return all, err
		}
		if m.current() {
			break
		}
	}
	if m.complete() && m.current() {
		m.watch.Settled(m.seen.V4.epoch)
	}
	return all, nil
}
