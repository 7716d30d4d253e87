package ping

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Outcome is the result of pinging one address.
type Outcome struct {
	Addr netip.Addr
	Sent int
	Lost int
	RTT  time.Duration // the shortest; 0: no answer
	Err  error         // why the kernel did not send: a packet larger than the device's MTU, no route
}

// spacing is the time between two packets of Once.
const spacing = 2 * time.Millisecond

// Once pings every address count times, with packets of size bytes (including the IP header) that must not be
// fragmented. After the last packet it waits no longer than wait. With knock it sends datagrams to a closed port: a
// node that ignores pings may reject those. It requires CAP_NET_RAW; an error means that this node cannot ping.
func Once(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration, knock bool) ([]Outcome, error) {
	s := Sockets{}
	defer s.Close()
	out := make([]Outcome, len(to))
	for i, a := range to {
		out[i].Addr = a
		if _, err := s.Open(addr.FamilyOf(a)); err != nil {
			return nil, err
		}
	}
	sent := make([]time.Time, count*len(to)) // by sequence number; zero: no answer is expected
	waiting := 0
	for seq := range sent {
		o := &out[seq%len(to)]
		o.Sent, o.Lost = o.Sent+1, o.Lost+1
		sent[seq] = time.Now()
		waiting++
		if err := s.Send(Packet{o.Addr, uint16(seq), size, knock}); err != nil {
			o.Err, sent[seq] = err, time.Time{}
			waiting--
		}
		sleep(ctx, spacing)
	}
	answered := func(r Reply) {
		seq := int(r.Seq)
		if seq >= len(sent) || sent[seq].IsZero() || out[seq%len(to)].Addr != r.From {
			return
		}
		o, rtt := &out[seq%len(to)], max(r.At.Sub(sent[seq]), 1)
		if o.Lost--; o.RTT == 0 || rtt < o.RTT {
			o.RTT = rtt
		}
		sent[seq] = time.Time{}
		waiting--
	}
	for end := time.Now().Add(wait); waiting > 0 && time.Now().Before(end) && ctx.Err() == nil; sleep(ctx, spacing) {
		if err := s.Receive(answered); err != nil {
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

// Packet is one to be sent.
type Packet struct {
	To    netip.Addr
	Seq   uint16
	Size  int  // in bytes, including the IP header
	Knock bool // a datagram to a closed port instead of an echo request
}

// Sockets are the open sockets by family. What they send is not fragmented.
type Sockets map[addr.Family]*Socket

// Open opens the socket of a family, unless it is open.
func (s Sockets) Open(f addr.Family) (opened bool, err error) {
	if s[f] != nil {
		return false, nil
	}
	socket, err := Open(f, uint16(rand.Uint32()), Probe)
	if err != nil {
		return false, err
	}
	s[f] = socket
	return true, nil
}

// Send sends a packet by the socket of its family.
func (s Sockets) Send(p Packet) error {
	socket := s[addr.FamilyOf(p.To)]
	switch {
	case socket == nil:
		return errors.New("no socket") // Open has reported why
	case p.Knock:
		return socket.Knock(p.To, p.Seq, p.Size)
	}
	return socket.Send(p.To, p.Seq, p.Size, nil)
}

// Receive hands over the replies that have arrived at any of the sockets.
func (s Sockets) Receive(take func(Reply)) error {
	var errs []error
	for _, socket := range s {
		errs = append(errs, socket.Receive(take))
	}
	return errors.Join(errs...)
}

// Close closes all sockets.
func (s Sockets) Close() {
	for _, socket := range s {
		socket.Close()
	}
	clear(s)
}
