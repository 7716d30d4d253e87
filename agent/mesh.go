package agent

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/probe"
	"github.com/overlayd/overlayd/status"
)

const (
	// judgeEvery bounds how often the log tells of the same trouble in other words: a thousand peers may fall silent one by one.
	judgeEvery = 30 * time.Second
	// silentNamed is how many peers such a line names.
	silentNamed = 3
)

// mesh pings the peers, and says which of them don't answer as they should.
type mesh struct {
	*probe.Mesh
	on     bool
	health *health

	mu     sync.Mutex
	size   int
	judged map[condition]judgement
}

// judgement is what was said last.
type judgement struct {
	at  time.Time
	bad bool
}

func newMesh(h *health, on bool) *mesh {
	m := &mesh{on: on, health: h, judged: map[condition]judgement{}}
	m.Mesh = probe.NewMesh(m.judge)
	return m
}

// replace makes the mesh that of these ways, with packets as large as pods may send.
func (m *mesh) replace(ways []backend.Way, size int) {
	if !m.on {
		return
	}
	m.mu.Lock()
	m.size = size
	m.mu.Unlock()
	m.Resize(size)
	m.Replace(targets(ways))
}

// change takes note of ways that are no more, and of others that are new.
func (m *mesh) change(gone, come []backend.Way) {
	if !m.on || len(gone)+len(come) == 0 {
		return
	}
	left := make([]netip.Prefix, 0, len(gone))
	for _, w := range gone {
		left = append(left, w.Peer.Subnets.Get(w.Family))
	}
	m.Change(left, targets(come))
}

func targets(ways []backend.Way) []probe.Target {
	out := make([]probe.Target, 0, len(ways))
	for _, w := range ways {
		if w.Ping.IsValid() {
			out = append(out, probe.Target{Subnet: w.Peer.Subnets.Get(w.Family), Name: w.Peer.Name(), Address: w.Ping})
		}
	}
	return out
}

// judge turns what came of the pings into problems: at once where there was none, and else not too often.
func (m *mesh) judge() {
	if !m.on {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	silent, small, err := m.Trouble(silentNamed)
	now := time.Now()
	for _, x := range []struct {
		condition
		err error
	}{
		{condProbe, err},
		{condSilent, trouble(silent, "pings are not answered: is the node up, and does every firewall on the way let the tunnel's packets pass?")},
		{condPathMTU, trouble(small, fmt.Sprintf("small packets arrive, those of %d bytes don't: the network between has a smaller MTU than this node's interface; "+
			"set the interface's MTU, or Backend.MTU in the network config", m.size))},
	} {
		last, bad := m.judged[x.condition], x.err != nil
		if bad != last.bad || bad && now.Sub(last.at) >= judgeEvery {
			m.judged[x.condition] = judgement{now, bad}
			m.health.set(x.condition, x.err)
		}
	}
}

func trouble(g probe.Group, what string) error {
	if g.Count == 0 {
		return nil
	}
	names := strings.Join(g.Names, ", ")
	if rest := g.Count - len(g.Names); rest > 0 {
		names += fmt.Sprintf(" and %d more", rest)
	}
	return fmt.Errorf("%s: %s", names, what)
}

func (m *mesh) summary() status.Probe {
	if !m.on {
		return status.Probe{Worst: []status.Peer{}}
	}
	return m.Summary()
}
