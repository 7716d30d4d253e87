// Package probe pings other nodes the way that pods' packets go, in small packets and in as large ones as pods may send, which are
// not to be cut up on the way. It knows addresses, and nothing of leases.
package probe

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/ping"
)

// SmallSize is the size of a small ping in bytes, with the IP header of either family.
const SmallSize = 64

// errNoSocket is why a packet was not sent where no socket could be made, which is said elsewhere.
var errNoSocket = errors.New("no socket")

// remind is how often the owner is told again that there is trouble.
const remind = 30 * time.Second

// Mesh pings targets in turn, a few each second, and keeps what came of it. It is safe for concurrent use.
type Mesh struct {
	changed func()

	mu      sync.Mutex
	rot     *rotation
	err     error
	told    time.Time
	sockets sockets
	wake    chan struct{}
}

// NewMesh makes a mesh that calls changed whenever the verdict on a target has changed, and now and then while some don't answer.
func NewMesh(changed func()) *Mesh {
	return &Mesh{changed: changed, rot: newRotation(), sockets: sockets{}, wake: make(chan struct{}, 1)}
}

// Replace makes these the targets. What is known of those that stay is kept.
func (m *Mesh) Replace(ts []Target) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rot.replace(ts)
	m.rouse()
}

// Change removes the targets for some subnets and adds others.
func (m *Mesh) Change(gone []netip.Prefix, come []Target) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range gone {
		if !slices.ContainsFunc(come, func(t Target) bool { return t.Subnet == p }) {
			m.rot.remove(p)
		}
	}
	for _, t := range come {
		m.rot.put(t, soon)
	}
	m.rouse()
}

// rouse has Run determine again how long to wait.
func (m *Mesh) rouse() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Resize sets the size of full packets in bytes, with their IP header: the pod MTU.
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
		m.sockets.close()
	}()
	// Nodes that start together don't ping in step.
	timer := time.NewTimer(rand.N(shortestPause))
	defer timer.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case <-m.wake: // there are other targets, perhaps after a time without any
			timer.Reset(m.next(time.Since(last)))
			continue
		}
		now := time.Now()
		m.step(now.Sub(last))
		last = now
		if d := m.next(0); d > 0 {
			timer.Reset(d)
		}
	}
}

// next is how long to wait after a step that was so long ago; 0: until there are targets.
func (m *Mesh) next(passed time.Duration) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.rot.targets)+len(m.rot.flights) == 0 {
		return 0
	}
	return max(m.rot.pause()-passed, 1)
}

// step reads the answers, gives up on what is late, and sends the next packets.
func (m *Mesh) step(passed time.Duration) {
	m.mu.Lock()
	before, errBefore := m.verdicts(), m.err
	opened := false
	var errs []error
	for _, f := range addr.Families() {
		if m.rot.families.Get(f) > 0 {
			made, err := m.sockets.open(f)
			opened, errs = opened || made, append(errs, err)
		}
	}
	m.err = errors.Join(append(errs, m.sockets.receive(m.rot.answered))...)
	now := time.Now()
	m.rot.expire(now)
	if !opened { // the kernel begins to note when packets arrive only a moment after it was asked to
		for _, p := range m.rot.due(now, passed) {
			at := time.Now()
			m.rot.departed(p.seq, at, m.sockets.send(p))
		}
	}
	after := m.verdicts()
	tell := before != after || (m.err == nil) != (errBefore == nil) || after != [3]int{} && now.Sub(m.told) >= remind
	if tell {
		m.told = now
	}
	m.mu.Unlock()
	if tell {
		m.changed()
	}
}

// verdicts is a value that changes when the targets of a verdict become more or fewer.
func (m *Mesh) verdicts() [3]int {
	c := m.rot.counts
	return [3]int{c[silent], c[smallOnly], c[lossy]}
}

// Summary is what is known of all targets together.
func (m *Mesh) Summary() status.Probe {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.rot.summary()
	if m.err != nil {
		p.Error = m.err.Error()
	}
	return p
}

// Peer is what is known of one target; nil: it is none.
func (m *Mesh) Peer(subnet netip.Prefix) *status.PeerProbe {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.rot.targets[subnet]
	if t == nil {
		return nil
	}
	p := t.result()
	return &p
}

// Trouble is what is wrong with the targets.
type Trouble struct {
	Targets           int // of all kinds
	Silent, SmallOnly Group
	Err               error // why none of them can be pinged
}

// Trouble lists the targets that don't answer, and those that answer small packets only: how many, and a few by name.
func (m *Mesh) Trouble(named int) Trouble {
	m.mu.Lock()
	defer m.mu.Unlock()
	group := func(v verdict) Group { return Group{m.rot.counts[v], m.rot.named(v, named)} }
	return Trouble{Targets: len(m.rot.targets), Silent: group(silent), SmallOnly: group(smallOnly), Err: m.err}
}

// Group is some targets.
type Group struct {
	Count int
	Names []string // of the first few
}

// Outcome is what came of pinging one address.
type Outcome struct {
	Addr netip.Addr
	Sent int
	Lost int
	RTT  time.Duration // the shortest; 0: nothing was answered
	Err  error         // why the kernel refused to send: a packet larger than the device's MTU, no route
}

// spacing is how far apart the packets of Once are.
const spacing = 2 * time.Millisecond

// Knock is Once with datagrams to a closed port instead of pings: a node that ignores pings may refuse those.
func Knock(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration) ([]Outcome, error) {
	return ask(ctx, to, size, count, wait, true)
}

// Once pings every address count times, with packets of size bytes (their IP header included) that must not be cut up on the way, and
// waits for answers, after the last packet, no longer than wait. It takes CAP_NET_RAW. An error is that of this node's means to ping.
func Once(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration) ([]Outcome, error) {
	return ask(ctx, to, size, count, wait, false)
}

func ask(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration, knock bool) ([]Outcome, error) {
	out := make([]Outcome, len(to))
	o := once{out: out, knock: knock, sockets: sockets{}, flights: map[uint16]int{}, sent: map[uint16]time.Time{}}
	defer o.sockets.close()
	for i, a := range to {
		out[i].Addr = a
		if _, err := o.sockets.open(addr.FamilyOf(a)); err != nil {
			return nil, err
		}
	}
	seq := uint16(0)
	for range count {
		for i := range out {
			seq++
			o.send(i, seq, size)
			sleep(ctx, spacing)
		}
	}
	for end := time.Now().Add(wait); len(o.flights) > 0 && time.Now().Before(end) && ctx.Err() == nil; sleep(ctx, spacing) {
		if err := o.sockets.receive(o.answered); err != nil {
			return nil, err
		}
	}
	return out, ctx.Err()
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// once is the state of Once.
type once struct {
	out     []Outcome
	knock   bool
	sockets sockets
	flights map[uint16]int // the index in out
	sent    map[uint16]time.Time
}

func (o *once) send(i int, seq uint16, size int) {
	o.out[i].Sent++
	o.out[i].Lost++
	o.flights[seq], o.sent[seq] = i, time.Now()
	if err := o.sockets.send(packet{o.out[i].Addr, seq, size, o.knock}); err != nil {
		o.out[i].Err = err
		delete(o.flights, seq)
	}
}

func (o *once) answered(r ping.Reply) {
	i, ok := o.flights[r.Seq]
	if !ok || o.out[i].Addr != r.From {
		return
	}
	delete(o.flights, r.Seq)
	x := &o.out[i]
	x.Lost--
	if rtt := max(r.At.Sub(o.sent[r.Seq]), 1); x.RTT == 0 || rtt < x.RTT {
		x.RTT = rtt
	}
}

// sockets are those of the families that packets are sent in.
type sockets map[addr.Family]*ping.Socket

// open makes the socket of a family, unless there is one.
func (s sockets) open(f addr.Family) (made bool, err error) {
	if s[f] != nil {
		return false, nil
	}
	socket, err := ping.Open(f, uint16(rand.Uint32()), ping.Probe)
	if err != nil {
		return false, err
	}
	s[f] = socket
	return true, nil
}

func (s sockets) send(p packet) error {
	socket := s[addr.FamilyOf(p.to)]
	switch {
	case socket == nil:
		return errNoSocket
	case p.knock:
		return socket.Knock(p.to, p.seq, p.size)
	}
	return socket.Send(p.to, p.seq, p.size, nil)
}

func (s sockets) receive(take func(ping.Reply)) error {
	var errs []error
	for _, socket := range s {
		errs = append(errs, socket.Receive(take))
	}
	return errors.Join(errs...)
}

func (s sockets) close() {
	for _, socket := range s {
		socket.Close()
	}
	clear(s)
}
