package faults

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/overlayd/overlayd/internal/ping"
	"github.com/overlayd/overlayd/test/lab"
)

const (
	pingEvery = 10 * time.Millisecond
	tcpEvery  = 20 * time.Millisecond
	// inFlight is how long the answer of a packet is waited for in any case.
	inFlight = 250 * time.Millisecond
)

// flow is a ping and a TCP connection from a pod of one node to a pod of another, in one family.
type flow struct {
	from, to *lab.Node
	name     string
	ping     *ping.Stream
	tcp      *lab.TCPStream
}

// traffic are flows between every two nodes.
type traffic []flow

// startTraffic starts flows between the first pods of every two nodes.
func startTraffic(ctx context.Context, l *lab.Lab) (t traffic, err error) {
	defer func() {
		if err != nil {
			t.stop()
		}
	}()
	for j := range l.Nodes() {
		for i := range j {
			from, to := i+1, j+1
			if (i+j)%2 == 0 { // so that each node pings others, and is pinged
				from, to = to, from
			}
			if t, err = t.start(ctx, l, from, to); err != nil {
				return t, err
			}
		}
	}
	return t, nil
}

// start adds the flows from the first pod of one node to that of another.
func (t traffic) start(ctx context.Context, l *lab.Lab, from, to int) (traffic, error) {
	a, errA := l.PodEndpoint(from, 1)
	b, errB := l.PodEndpoint(to, 1)
	if err := errors.Join(errA, errB); err != nil {
		return t, err
	}
	for _, f := range l.Topology().Options.Stack.Families() {
		fl := flow{from: a.Node, to: b.Node, name: fmt.Sprintf("%s to %s %s", a.Name, b.Name, f)}
		var errPing, errTCP error
		fl.ping, errPing = a.StreamPing(ctx, b.Addr.Get(f), pingEvery)
		fl.tcp, errTCP = a.StreamTCP(ctx, b.Machine, b.Addr.Get(f), tcpEvery)
		t = append(t, fl)
		if err := errors.Join(errPing, errTCP); err != nil {
			return t, fmt.Errorf("%s: %w", fl.name, err)
		}
	}
	return t, nil
}

func (t traffic) stop() {
	for _, f := range t {
		if f.ping != nil {
			f.ping.Close()
		}
		if f.tcp != nil {
			f.tcp.Stop()
		}
	}
}

// loss is what a fault did to the traffic.
type loss struct {
	Lost      int       // pings of all flows
	Elsewhere int       // those between two nodes that the fault was not done to
	Last      time.Time // when the last lost one was sent
	Broken    []string  // TCP connections that ended
	Where     string    // the flow that lost most
}

// between sums up what happened to the traffic that was sent from one moment to another.
func (t traffic) between(from, to time.Time, hit ...*lab.Node) loss {
	var out loss
	most := 0
	for _, f := range t {
		p := f.ping.Stats(from, to)
		out.Lost += p.Lost
		if !slices.Contains(hit, f.from) && !slices.Contains(hit, f.to) {
			out.Elsewhere += p.Lost
		}
		if p.LastLost.After(out.Last) {
			out.Last = p.LastLost
		}
		if p.Lost > most {
			most, out.Where = p.Lost, f.name
		}
		if err := f.tcp.Broken(); err != nil {
			out.Broken = append(out.Broken, fmt.Sprintf("%s: %v", f.name, err))
		}
	}
	return out
}

// problems says in what the traffic suffered more than a fault may make it suffer.
func (l loss) problems(f Fault) (out []string) {
	if l.Elsewhere > 0 && !f.Bound.Every {
		out = append(out, fmt.Sprintf("%d packets lost between nodes that have nothing to do with it", l.Elsewhere))
	}
	if f.Ruins {
		return out // the victim's pods are others now
	}
	for _, b := range l.Broken {
		out = append(out, "a TCP connection broke: "+b)
	}
	if f.Bound.Lost != Any && l.Lost > f.Bound.Lost {
		out = append(out, fmt.Sprintf("%d packets lost, most from %s: at most %d may be", l.Lost, l.Where, f.Bound.Lost))
	}
	return out
}
