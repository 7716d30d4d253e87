package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/overlayd/overlayd/addr"
)

// PingStream is a ping that goes on until it is stopped, over one socket, to see what a fault does to traffic that flows.
type PingStream struct {
	conn  *net.IPConn
	token pingToken
	to    netip.Addr
	stop  context.CancelFunc

	sender, receiver sync.WaitGroup

	mu       sync.Mutex
	sent     []time.Time // by sequence number
	answered []bool
}

// StreamStats is what became of a stream's packets.
type StreamStats struct {
	Sent, Lost int
	// Gap is the longest time between two packets sent that got an answer, if anything between them was lost; LastLost is when
	// the last lost one was sent.
	Gap      time.Duration
	LastLost time.Time
}

// StreamPing starts to ping an address from the machine, at an interval.
func (m Machine) StreamPing(ctx context.Context, to netip.Addr, interval time.Duration) (*PingStream, error) {
	conn, err := m.dialICMP(ctx, Ping{To: to})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	s := &PingStream{conn: conn, token: newToken(), to: to, stop: stop}
	s.sender.Go(func() { s.send(ctx, interval) })
	s.receiver.Go(s.receive)
	return s, nil
}

// LateAnswer is how long an answer may take until it is read on a machine that has much to do: what has none by then is lost.
const LateAnswer = 5 * time.Second

// Stop ends the stream, waits for answers that are missing, and says what was lost.
func (s *PingStream) Stop() StreamStats {
	s.stop()
	s.sender.Wait()
	for end := time.Now().Add(LateAnswer); time.Now().Before(end) && s.Stats(time.Time{}, end).Lost > 0; {
		time.Sleep(20 * time.Millisecond)
	}
	s.Close()
	return s.Stats(time.Time{}, time.Now())
}

// Close ends the stream without waiting for answers.
func (s *PingStream) Close() {
	s.stop()
	s.sender.Wait()
	_ = s.conn.SetReadDeadline(time.Now())
	s.receiver.Wait()
	_ = s.conn.Close()
}

// Stats says what became of the packets that were sent from one moment to another. Answers to the last of them may be on the way.
func (s *PingStream) Stats(from, to time.Time) StreamStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out StreamStats
	var lastGood time.Time
	lost := false
	for i, at := range s.sent {
		if at.Before(from) || at.After(to) {
			continue
		}
		out.Sent++
		if !s.answered[i] {
			out.Lost++
			out.LastLost = at
			lost = true
			continue
		}
		if lost && !lastGood.IsZero() {
			out.Gap = max(out.Gap, at.Sub(lastGood))
		}
		lastGood, lost = at, false
	}
	return out
}

func (s *PingStream) send(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		s.mu.Lock()
		seq := len(s.sent)
		s.sent, s.answered = append(s.sent, time.Now()), append(s.answered, false)
		s.mu.Unlock()
		_, _ = s.conn.Write(s.request(seq)) // what can't be sent counts as lost: there is no way at this moment
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *PingStream) request(seq int) []byte {
	var typ icmp.Type = ipv4.ICMPTypeEcho
	if addr.FamilyOf(s.to) == addr.IPv6 {
		typ = ipv6.ICMPTypeEchoRequest
	}
	data := binary.BigEndian.AppendUint64(append([]byte{}, s.token[:]...), uint64(seq))
	id := int(binary.BigEndian.Uint16(s.token[:2]))
	msg, _ := (&icmp.Message{Type: typ, Body: &icmp.Echo{ID: id, Seq: seq & 0xffff, Data: data}}).Marshal(nil) // never fails for an echo
	return msg
}

func (s *PingStream) receive() {
	reply := byte(ipv4.ICMPTypeEchoReply)
	if s.to.Is6() {
		reply = byte(ipv6.ICMPTypeEchoReply)
	}
	buf := make([]byte, 1<<16)
	for {
		n, _, err := s.conn.ReadFromIP(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error about one of our packets
		}
		got := buf[:n]
		if len(got) < icmpHeader+len(s.token)+8 || got[0] != reply || pingToken(got[icmpHeader:][:len(s.token)]) != s.token {
			continue
		}
		seq := binary.BigEndian.Uint64(got[icmpHeader+len(s.token):])
		s.mu.Lock()
		if seq < uint64(len(s.answered)) {
			s.answered[seq] = true
		}
		s.mu.Unlock()
	}
}
