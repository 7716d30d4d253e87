package ping

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Stream pings one address at an interval over one socket, whether or not the packets before were answered, to see what
// a fault does to traffic that flows.
type Stream struct {
	Options
	socket *Socket
	stop   context.CancelFunc
	closed chan struct{}
	runner sync.WaitGroup

	mu       sync.Mutex
	sent     []time.Time
	answered []bool
	refused  int
	err      error
}

// Options say what a Stream sends.
type Options struct {
	To    netip.Addr
	Every time.Duration
	Size  int // of the whole packet in bytes; 0 for a small one
	PMTU  PMTU
	Count int // how many; 0: until it is stopped
}

// Stats is what became of a stream's packets.
type Stats struct {
	Sent, Lost int
	// Gap is the longest time between two packets sent that got an answer, if anything between them was lost; LastLost is
	// when the last lost one was sent.
	Gap      time.Duration
	LastLost time.Time
	// Refused counts those of the lost ones that the kernel did not send: there was no route at that moment, for example.
	// Err is why it did not send the last of them. Both are about the whole stream.
	Refused int
	Err     error
}

// Start starts a stream from the network namespace of the calling thread. It sends until the context ends, and must be
// closed.
func Start(ctx context.Context, o Options) (*Stream, error) {
	socket, err := Open(addr.FamilyOf(o.To), uint16(rand.Uint32()), o.PMTU)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	s := &Stream{Options: o, socket: socket, stop: stop, closed: make(chan struct{})}
	s.runner.Go(func() { s.run(ctx) })
	return s, nil
}

func (s *Stream) run(ctx context.Context) {
	tick := time.NewTicker(s.Every)
	defer tick.Stop()
	for {
		s.step(ctx)
		select {
		case <-s.closed:
			return
		case <-tick.C:
		}
	}
}

func (s *Stream) step(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.sent); ctx.Err() == nil && (s.Count == 0 || n < s.Count) {
		s.sent, s.answered = append(s.sent, time.Now()), append(s.answered, false)
		if err := s.socket.Send(s.To, uint16(n), s.Size, nil); err != nil {
			s.refused, s.err = s.refused+1, err
		}
	}
	_ = s.socket.Receive(func(r Reply) {
		last := len(s.sent) - 1
		// Of those with this number, the one that was sent last.
		if i := last - int(uint16(last)-r.Seq); i >= 0 && r.From == s.To {
			s.answered[i] = true
		}
	})
}

// Stop ends the sending, waits for answers that are missing, though not longer than some time, and says what was lost.
func (s *Stream) Stop(wait time.Duration) Stats {
	s.stop()
	all := func() Stats { return s.Stats(time.Time{}, time.Now()) }
	out := all()
	for end := time.Now().Add(wait); out.Lost > out.Refused && time.Now().Before(end); out = all() {
		time.Sleep(5 * time.Millisecond)
	}
	s.Close()
	return out
}

// Close ends the stream without waiting for answers.
func (s *Stream) Close() {
	s.stop()
	close(s.closed)
	s.runner.Wait()
	s.socket.Close()
}

// Stats says what became of the packets that were sent from one moment to another. Answers to the last of them may be
// on the way.
func (s *Stream) Stats(from, to time.Time) Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Stats{Refused: s.refused, Err: s.err}
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
