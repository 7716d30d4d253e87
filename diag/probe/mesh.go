// Package probe pings peers on the path that pods' packets take, in small packets and in packets of the pod MTU, which
// must not be fragmented. It knows addresses, and no leases.
package probe

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/ping"
)

// SmallSize is the size of a small ping in bytes, including the IP header of either family.
const SmallSize = 64

// remind is how often the owner is notified again while targets fail.
const remind = 30 * time.Second

// Mesh pings targets in turn, a few per second, and keeps the results. It is safe for concurrent use.
type Mesh struct {
	changed func()

	mu       sync.Mutex
	rot      *rotation
	err      error
	notified time.Time
	sockets  ping.Sockets
}

// NewMesh returns a mesh that calls changed when the number of failing targets changes, and regularly while some fail.
func NewMesh(changed func()) *Mesh {
	return &Mesh{changed: changed, rot: newRotation(), sockets: ping.Sockets{}}
}

// Change removes the targets for the subnets in gone and adds those in come. A target in both, with the same address,
// keeps its results and its turn.
func (m *Mesh) Change(gone []netip.Prefix, come []Target) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rot.change(gone, come)
}

// Subnets lists the subnets of all targets.
func (m *Mesh) Subnets() []netip.Prefix {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]netip.Prefix, 0, len(m.rot.targets))
	for _, t := range m.rot.targets {
		out = append(out, t.Subnet)
	}
	return out
}

// Resize sets the size of full packets in bytes, including their IP header: the pod MTU.
func (m *Mesh) Resize(bytes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rot.size = bytes
}

// Run pings until ctx ends.
func (m *Mesh) Run(ctx context.Context) error {
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.sockets.Close()
	}()
	last, pause := time.Now(), rand.N(shortestPause) // nodes that start together do not ping in step
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		now := time.Now()
		pause = m.step(now.Sub(last))
		last = now
	}
}

// step reads the answers, gives up overdue ones, and sends the next packets. It returns the time until the next step.
func (m *Mesh) step(passed time.Duration) time.Duration {
	m.mu.Lock()
	before, errBefore := m.failing(), m.err
	opened := false
	var errs []error
	for _, f := range addr.Families() {
		if m.rot.families.Get(f) > 0 {
			made, err := m.sockets.Open(f)
			opened, errs = opened || made, append(errs, err)
		}
	}
	m.err = errors.Join(append(errs, m.sockets.Receive(m.rot.answered))...)
	now := time.Now()
	m.rot.expire(now)
	if !opened { // the kernel starts to record arrival times a moment after a socket is opened
		for _, p := range m.rot.next(now, passed) {
			at := time.Now()
			m.rot.sentAt(p.Seq, at, m.sockets.Send(p))
		}
	}
	after := m.failing()
	notify := before != after || (m.err == nil) != (errBefore == nil) ||
		after != [3]int{} && now.Sub(m.notified) >= remind
	if notify {
		m.notified = now
	}
	pause := m.rot.pause()
	m.mu.Unlock()
	if notify {
		m.changed()
	}
	return pause
}

// failing counts the targets that do not answer properly, by verdict.
func (m *Mesh) failing() [3]int {
	c := m.rot.counts
	return [3]int{c[status.Lossy], c[status.SmallOnly], c[status.Silent]}
}

// Summary is the result for all targets together.
func (m *Mesh) Summary() status.Probe {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.rot.summary()
	if m.err != nil {
		p.Error = m.err.Error()
	}
	return p
}

// Peer is the result for one target; nil if there is none for the subnet.
func (m *Mesh) Peer(subnet netip.Prefix) *status.PeerProbe {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.rot.target(subnet)
	if t == nil {
		return nil
	}
	p := t.result()
	return &p
}

// Trouble describes failing targets.
type Trouble struct {
	Targets           int // of all kinds
	Size              int // of full packets in bytes
	Silent, SmallOnly Group
	Err               error // why none of them can be pinged
}

// Group is a number of targets.
type Group struct {
	Count int
	Names []string // of the first few
}

// Trouble counts the targets that do not answer and those that answer only small packets, and names a few.
func (m *Mesh) Trouble(named int) Trouble {
	m.mu.Lock()
	defer m.mu.Unlock()
	group := func(v status.Verdict) Group { return Group{m.rot.counts[v], m.rot.named(v, named)} }
	return Trouble{
		Targets: len(m.rot.targets), Size: m.rot.size, Silent: group(status.Silent), SmallOnly: group(status.SmallOnly), Err: m.err,
	}
}
