package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/overlayd/overlayd/diag/probe"
	"github.com/overlayd/overlayd/diag/status"
)

// silentNamed is how many peers a problem names.
const silentNamed = 3

// mesh pings the peers, and reports which of them don't answer as they should.
type mesh struct {
	*probe.Mesh
	on     bool
	health *health
	mu     sync.Mutex // what is judged last is newest
}

func newMesh(h *health, on bool) *mesh {
	m := &mesh{on: on, health: h}
	m.Mesh = probe.NewMesh(m.judge)
	return m
}

// change replaces some paths by others.
func (m *mesh) change(changes []pathChange) {
	if !m.on || len(changes) == 0 {
		return
	}
	var left []netip.Prefix
	var come []probe.Target
	for _, c := range changes {
		if c.was.Peer != nil {
			left = append(left, c.subnet())
		}
		if ip := c.is.Ping(); ip.IsValid() {
			come = append(come, probe.Target{Subnet: c.subnet(), Name: c.is.Peer.Name(), Address: ip})
		}
	}
	m.Change(left, come)
	m.judge() // a peer that is gone is no longer silent
}

// judge turns what came of the pings into problems.
func (m *mesh) judge() {
	if !m.on {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.Trouble(silentNamed)
	m.health.set(condProbe, t.Err)
	m.health.set(condSilent, silentError(t))
	m.health.set(condPathMTU, trouble(t.SmallOnly, fmt.Sprintf("small packets arrive, those of %d bytes do not: a network "+
		"on the path has a smaller MTU than this node's interface; set that MTU on the interface, or as Backend.MTU in the "+
		"network config (overlayd doctor measures it)", t.Size)))
}

func silentError(t probe.Trouble) error {
	if t.Silent.Count > 1 && t.Silent.Count == t.Targets {
		return trouble(t.Silent, "no peer answers pings: most likely this node's own firewall or network drops them; "+
			"run overlayd doctor")
	}
	return trouble(t.Silent,
		"pings are not answered: is the node up, does every firewall on the path accept the tunnel's packets, "+
			"and does the node answer pings (net.ipv4.icmp_echo_ignore_all, net.ipv6.icmp.echo_ignore_all, "+
			"a firewall that drops ICMP)?")
}

func trouble(g probe.Group, what string) error {
	if g.Count == 0 {
		return nil
	}
	names := slices.Compact(slices.Clone(g.Names)) // each name is listed once for each family
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
