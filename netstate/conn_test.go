package netstate

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fault changes what a dump says on its way from the kernel, for the first n dumps of each kind of request.
type fault func(h []byte)

// inject puts a fault into the first n dumps that are made from now on.
func (n *node) inject(dumps int, f fault) {
	receive := unix.Recvfrom
	seen := map[uint32]bool{}
	n.k.conn.recv = func(fd int, p []byte, flags int) (int, unix.Sockaddr, error) {
		size, from, err := receive(fd, p, flags)
		for b := p[:max(size, 0)]; len(b) >= unix.NLMSG_HDRLEN; {
			seen[binary.NativeEndian.Uint32(b[8:])] = true
			if len(seen) <= dumps {
				f(b)
			}
			b = b[min(int(binary.NativeEndian.Uint32(b)+3)&^3, len(b)):]
		}
		return size, from, err
	}
	n.t.Cleanup(func() { n.k.conn.recv = receive })
}

func interrupted(h []byte) {
	binary.NativeEndian.PutUint16(h[6:], binary.NativeEndian.Uint16(h[6:])|unix.NLM_F_DUMP_INTR)
}

// onlyTheEnd is a dump that was interrupted so early that nothing came: all but its last message are turned into no-ops
// of another request, and the last says that it was interrupted.
func onlyTheEnd(h []byte) {
	if binary.NativeEndian.Uint16(h[4:]) == unix.NLMSG_DONE {
		interrupted(h)
		return
	}
	binary.NativeEndian.PutUint32(h[8:], 0)
}

func failed(h []byte) {
	if binary.NativeEndian.Uint16(h[4:]) == unix.NLMSG_DONE {
		errno := -int32(unix.ENOMEM)
		binary.NativeEndian.PutUint32(h[unix.NLMSG_HDRLEN:], uint32(errno))
	}
}

func TestInterruptedDumps(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := fullState()
	n.converge(want)
	for name, f := range map[string]fault{"in the middle": interrupted, "nothing but the end": onlyTheEnd} {
		for _, dumps := range []int{1, dumpTries - 1} {
			t.Run(fmt.Sprintf("%s %d times", name, dumps), func(t *testing.T) {
				n := &node{NS: n.NS, t: t, k: n.k}
				n.inject(dumps, f)
				n.forget()
				if done := n.converge(want); len(done) > 0 {
					t.Errorf("taken for true: %v", done)
				}
			})
		}
		for _, desired := range []State{want, {}} {
			t.Run(fmt.Sprintf("%s for ever, %d objects wanted", name, len(objects(desired))), func(t *testing.T) {
				n := &node{NS: n.NS, t: t, k: n.k}
				n.inject(1<<30, f)
				n.refuseToAct(desired, errInterrupted)
				n.wantState(want)
			})
		}
	}
	t.Run("failed", func(t *testing.T) {
		n := &node{NS: n.NS, t: t, k: n.k}
		n.inject(1<<30, failed)
		n.refuseToAct(want, unix.ENOMEM)
		n.wantState(want)
	})
	t.Run("no answer", func(t *testing.T) {
		n := &node{NS: n.NS, t: t, k: n.k}
		n.inject(0, nil)
		n.k.conn.recv = func(int, []byte, int) (int, unix.Sockaddr, error) { return -1, nil, unix.EAGAIN }
		n.refuseToAct(want, os.ErrDeadlineExceeded)
		n.wantState(want)
	})
	n.forget()
	if done := n.converge(want); len(done) > 0 { // answers to what was given up are passed over
		t.Errorf("afterwards: %v", done)
	}
}

// refuseToAct checks that neither Observe nor Reconcile works on what it could not read.
func (n *node) refuseToAct(desired State, want error) {
	n.t.Helper()
	n.refuseToObserve(want)
	n.Do(func() {
		if res, err := n.k.Reconcile(all(desired)); !errors.Is(err, want) || len(res.Done)+len(res.Failed) > 0 {
			n.t.Errorf("Reconcile: %v, %v", res, err)
		}
	})
}

// TestAnswersAreLost: what the kernel did is then not known, and is looked up.
func TestAnswersAreLost(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := fullState()
	n.converge(State{Links: want.Links, Sysctls: want.Sysctls})
	n.observe()
	n.k.conn.recv = func(_ int, _ []byte, flags int) (int, unix.Sockaddr, error) {
		if flags&unix.MSG_DONTWAIT != 0 {
			return -1, nil, unix.EAGAIN
		}
		return -1, nil, unix.ENOBUFS
	}
	var res Result
	n.Do(func() { res, _ = n.k.Reconcile(all(want)) })
	if len(res.Failed) == 0 || !errors.Is(res.Failed[len(res.Failed)-1], unix.ENOBUFS) {
		t.Errorf("got %v", res.Failed)
	}
	n.k.conn.recv = unix.Recvfrom
	n.converge(want)
	n.wantState(want)
}

// TestDumpsWhileOthersWrite: whatever others change meanwhile, our own objects are all seen.
func TestDumpsWhileOthersWrite(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := manyPeers(2000)
	n.converge(want)
	var batch strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&batch, "route add 10.%d.%d.128/25 dev eth0\nneigh add 192.0.2.%d lladdr 02:00:00:00:00:99 dev eth0 nud permanent\n", 128+i>>8, i&255, 2+i%250)
	}
	batch.WriteString(strings.ReplaceAll(batch.String(), " add ", " del "))
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		n.Do(func() {
			for ctx.Err() == nil {
				cmd := exec.CommandContext(ctx, "ip", "-force", "-batch", "-")
				cmd.Stdin = strings.NewReader(batch.String())
				_ = cmd.Run()
			}
		})
	}()
	defer func() { cancel(); <-stopped }()
	for range 60 {
		n.observe()
		if got := *n.k.observed; !reflect.DeepEqual(got, want) {
			cs := Diff(got, want)
			t.Fatalf("%d objects seen wrongly, %v ...", len(cs), cs[:min(len(cs), 3)])
		}
	}
}

// TestDumpGivenUpHalfWay: the rest of it is still to come when the next one begins.
func TestDumpGivenUpHalfWay(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	want := manyPeers(2000)
	n.converge(want)
	received := 0
	n.k.conn.recv = func(fd int, p []byte, flags int) (int, unix.Sockaddr, error) {
		if flags&unix.MSG_DONTWAIT == 0 {
			if received++; received == 2 {
				return -1, nil, unix.ENOBUFS
			}
		}
		return unix.Recvfrom(fd, p, flags)
	}
	n.refuseToObserve(unix.ENOBUFS)
	n.observe()
	if got := *n.k.observed; !reflect.DeepEqual(got, want) {
		t.Errorf("%d objects seen wrongly", len(Diff(got, want)))
	}
}

func (n *node) refuseToObserve(want error) {
	n.t.Helper()
	n.Do(func() {
		if _, err := n.k.Observe(); !errors.Is(err, want) {
			n.t.Errorf("Observe: %v", err)
		}
	})
}
