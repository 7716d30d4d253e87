package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/overlayd/overlayd/backend"
	"github.com/overlayd/overlayd/diag/probe"
	"github.com/overlayd/overlayd/diag/status"
)

const (
	// sayEvery bounds how often the log tells of the same trouble in other words: a thousand peers may fall silent one by one.
	sayEvery = 30 * time.Second
	// silentNamed is how many peers such a line names.
	silentNamed = 3
)

// mesh pings the peers, and says which of them don't answer as they should.
type mesh struct {
	*probe.Mesh
	on     bool
	health *health

	mu   sync.Mutex
	size int
	said map[condition]time.Time // when the log last told of a changed reason
}

func newMesh(h *health, on bool) *mesh {
	m := &mesh{on: on, health: h, said: map[condition]time.Time{}}
	m.Mesh = probe.NewMesh(m.judge)
	return m
}

// resize sets how large packets pods may send.
func (m *mesh) resize(bytes int) {
	m.mu.Lock()
	m.size = bytes
	m.mu.Unlock()
	m.Resize(bytes)
}

// change takes note of ways that are no more, and of others that are new. all: there are no others than these.
func (m *mesh) change(gone, come []backend.Way, all bool) {
	switch {
	case !m.on:
		return
	case all:
		m.Replace(targets(come))
	case len(gone)+len(come) == 0:
		return
	default:
		left := make([]netip.Prefix, 0, len(gone))
		for _, w := range gone {
			left = append(left, w.Peer.Subnets.Get(w.Family))
		}
		m.Change(left, targets(come))
	}
	m.judge() // who is gone is no trouble any more
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

// judge turns what came of the pings into problems.
func (m *mesh) judge() {
	if !m.on {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.Trouble(silentNamed)
	now := time.Now()
	for _, x := range []struct {
		condition
		err error
	}{
		{condProbe, t.Err},
		{condSilent, silentError(t)},
		{condPathMTU, trouble(t.SmallOnly, fmt.Sprintf("small packets arrive, those of %d bytes don't: the network between has a smaller MTU than this node's interface; "+
			"set the interface's MTU, or Backend.MTU in the network config, to what that network carries "+
			"(overlayd doctor measures it)", m.size))},
	} {
		say := now.Sub(m.said[x.condition]) >= sayEvery
		if say {
			m.said[x.condition] = now
		}
		m.health.note(x.condition, x.err, say)
	}
}

func silentError(t probe.Trouble) error {
	if t.Silent.Count > 1 && t.Silent.Count == t.Targets {
		return trouble(t.Silent, "no peer at all answers pings: most likely it is this node's own firewall or network; run overlayd doctor")
	}
	return trouble(t.Silent,
		"pings are not answered: is the node up, does every firewall on the path let the tunnel's packets pass, "+
			"and does the node answer at all (net.ipv4.icmp_echo_ignore_all, net.ipv6.icmp.echo_ignore_all, "+
			"a firewall that drops ICMP)?")
}

func trouble(g probe.Group, what string) error {
	if g.Count == 0 {
		return nil
	}
	names := slices.Compact(slices.Clone(g.Names)) // a name stands there for each family
	text := strings.Join(names, ", ")
	if rest := g.Count - len(g.Names); rest > 0 {
		text += fmt.Sprintf(" and %d more", rest)
	}
	return fmt.Errorf("%s: %s", text, what)
}

func (m *mesh) summary() status.Probe {
	if !m.on {
		return status.Probe{Worst: []status.Peer{}}
	}
	return m.Summary()
}
