package lab

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/ping"
)

// pingToken marks one echo request, so that its reply and its way through the underlay are recognised. It stands at the
// start of the data.
type pingToken [16]byte

func newToken() pingToken {
	var t pingToken
	_, _ = rand.Read(t[:]) // never fails
	return t
}

// Ping is one echo request.
type Ping struct {
	To    netip.Addr
	MTU   int           // the size of the whole IP packet; 0 for a small one
	DF    bool          // never to be fragmented
	Wait  time.Duration // for the reply
	token pingToken
}

// LateAnswer is how long an answer may take until it is read on a machine that has much to do: what has none by then is
// lost.
const LateAnswer = 5 * time.Second

// Ping sends one echo request from the machine and waits for its reply. It returns the source address that the kernel
// chose.
func (m Machine) Ping(ctx context.Context, p Ping) (netip.Addr, error) {
	if p.token == (pingToken{}) {
		p.token = newToken()
	}
	pmtu := ping.Fragment
	if p.DF {
		pmtu = ping.DontFragment
	}
	var s *ping.Socket
	err := m.Do(func() (err error) {
		s, err = ping.Open(addr.FamilyOf(p.To), binary.BigEndian.Uint16(p.token[:]), pmtu)
		return err
	})
	if err != nil {
		return netip.Addr{}, err
	}
	defer s.Close()
	local, err := s.Connect(p.To)
	if err != nil {
		return local, err
	}
	if err := s.Send(p.To, 1, p.MTU, p.token[:]); err != nil {
		return local, err
	}
	for end := time.Now().Add(p.Wait); ; s.Wait(time.Until(end)) {
		answered := false
		err := s.Receive(func(ping.Reply) { answered = true })
		if err = cmp.Or(err, ctx.Err()); err != nil || answered {
			return local, err
		}
		if time.Now().After(end) {
			return local, fmt.Errorf("no reply within %s", p.Wait)
		}
	}
}

// StreamPing starts to ping an address from the machine, at an interval.
func (m Machine) StreamPing(ctx context.Context, to netip.Addr, interval time.Duration) (*ping.Stream, error) {
	var s *ping.Stream
	err := m.Do(func() (err error) {
		s, err = ping.Start(ctx, ping.Options{To: to, Every: interval, PMTU: ping.Fragment})
		return err
	})
	return s, err
}
