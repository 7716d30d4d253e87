package netstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// conn is one rtnetlink socket, kept open. It serves one goroutine.
type conn struct {
	fd  int
	seq uint32
	buf []byte   // what is received
	out messages // what is sent

	recv func(fd int, p []byte, flags int) (int, unix.Sockaddr, error) // unix.Recvfrom; a test puts faults in between
}

const (
	// batchSize bounds the bytes of one send. The kernel works through a send before it returns: an answer to each request
	// that failed must fit into the receive buffer, and the hash table of a device's FDB entries can't grow meanwhile.
	// With 64 kB, an FDB entry of 20,000 takes four times as long as with 16 kB; with 4 kB, the system calls begin to
	// show.
	batchSize = 16 << 10
	// recvBuffer holds the answers to a batch and some of a dump, or what the monitor is notified of while it is busy.
	recvBuffer = 4 << 20
	// recvTimeout bounds the wait for an answer. The kernel answers within milliseconds, or the answer was lost.
	recvTimeout = 10 * time.Second
	// dumpTries is how often an interrupted dump is started again.
	dumpTries = 8
)

// errInterrupted says that the kernel's state changed while it was dumped: what came can't be used.
var errInterrupted = errors.New("the kernel's state kept changing while it was read")

// dial opens a socket in the network namespace of the calling thread.
func dial() (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	c := &conn{fd: fd, buf: make([]byte, 64<<10), recv: unix.Recvfrom}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		c.close()
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	// A text with an error, answers without the request, filtered dumps.
	for _, opt := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK, unix.NETLINK_GET_STRICT_CHK} {
		_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, opt, 1)
	}
	setBuffer(fd)
	tv := unix.NsecToTimeval(int64(recvTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		c.close()
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return c, nil
}

// setBuffer is forced where that is allowed (CAP_NET_ADMIN).
func setBuffer(fd int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, recvBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, recvBuffer)
	}
}

func (c *conn) close() { _ = unix.Close(c.fd) }

// each sends n requests with few system calls. Each is written by put; those that put or the kernel refuses are
// returned by their number, with the reason.
func (c *conn) each(n int, put func(i int, out *messages) error) map[int]error {
	refused := map[int]error{}
	for at := 0; at < n; {
		begin, first := at, c.seq+1
		for c.out.reset(); at < n && c.out.open < batchSize; at++ {
			c.seq++
			c.out.seq = c.seq
			if err := put(at, &c.out); err != nil {
				refused[at] = err
			}
		}
		err := c.batch(first, func(number uint32, err error) { refused[begin+int(number)] = err })
		if err == nil {
			continue
		}
		for i := begin; i < n; i++ { // what the kernel did is not known
			if refused[i] == nil {
				refused[i] = err
			}
		}
		break
	}
	return refused
}

// batch sends what was put into out. Only the last request asks for an acknowledgement: the kernel reports failures
// without being asked. Each failure is handed over with the request's number from the first one.
func (c *conn) batch(first uint32, failed func(number uint32, err error)) error {
	whole := c.out.buf[:c.out.open]
	if len(whole) == 0 {
		return nil
	}
	last := c.out.askForAck()
	if err := c.send(whole); err != nil {
		return err
	}
	return c.receive(func(h unix.NlMsghdr, body []byte) (bool, error) {
		number := h.Seq - first
		if h.Type != unix.NLMSG_ERROR || number > last-first {
			return false, nil // an answer to a request that was given up
		}
		if err := ackError(h, body); err != nil {
			failed(number, err)
		}
		return h.Seq == last, nil
	})
}

// dump asks for all objects of a kind; each is called with every message's type and body, and must not keep the body.
// After errInterrupted it has seen parts of several attempts, so reset is called before each.
func (c *conn) dump(
	typ uint16, header nl.NetlinkRequestData, attrs []*nl.RtAttr, reset func(), each func(body []byte),
) error {
	for range dumpTries {
		reset()
		req := nl.NewNetlinkRequest(int(typ), unix.NLM_F_DUMP)
		req.AddData(header)
		for _, a := range attrs {
			req.AddData(a)
		}
		c.seq++
		req.Seq = c.seq
		if err := c.send(req.Serialize()); err != nil {
			return err
		}
		interrupted := false
		err := c.receive(func(h unix.NlMsghdr, body []byte) (bool, error) {
			if h.Seq != req.Seq {
				return false, nil
			}
			interrupted = interrupted || h.Flags&unix.NLM_F_DUMP_INTR != 0
			switch h.Type {
			case unix.NLMSG_DONE:
				return true, doneError(body)
			case unix.NLMSG_ERROR:
				return true, ackError(h, body)
			}
			each(body)
			return false, nil
		})
		if err != nil {
			return err
		}
		if !interrupted {
			return nil
		}
	}
	return errInterrupted
}

// send drops what may be left of an exchange that was given up: while a dump is not read to its end, the kernel begins
// no other.
func (c *conn) send(b []byte) error {
	for err := error(nil); err == nil || errors.Is(err, unix.ENOBUFS); {
		_, _, err = c.recv(c.fd, c.buf, unix.MSG_DONTWAIT)
	}
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("netlink send: %w", err)
	}
	return nil
}

// receive hands over messages until done says that it was the last.
func (c *conn) receive(each func(h unix.NlMsghdr, body []byte) (done bool, err error)) error {
	for {
		n, from, err := c.recv(c.fd, c.buf, unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("the kernel did not answer within %v: %w", recvTimeout, os.ErrDeadlineExceeded)
		case err != nil:
			return fmt.Errorf("netlink receive: %w", err)
		case n > len(c.buf):
			return fmt.Errorf("netlink message of %d bytes is longer than %d", n, len(c.buf))
		}
		if sa, ok := from.(*unix.SockaddrNetlink); !ok || sa.Pid != 0 {
			continue // not from the kernel
		}
		for b := c.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			h, body, rest, err := cutMessage(b)
			if err != nil {
				return err
			}
			if done, err := each(h, body); done || err != nil {
				return err
			}
			b = rest
		}
	}
}

// cutMessage takes the first message off (struct nlmsghdr, uapi/linux/netlink.h).
func cutMessage(b []byte) (h unix.NlMsghdr, body, rest []byte, err error) {
	h = unix.NlMsghdr{
		Len: binary.NativeEndian.Uint32(b), Type: binary.NativeEndian.Uint16(b[4:]),
		Flags: binary.NativeEndian.Uint16(b[6:]), Seq: binary.NativeEndian.Uint32(b[8:]),
	}
	if h.Len < unix.NLMSG_HDRLEN || int(h.Len) > len(b) {
		return h, nil, nil, fmt.Errorf("netlink message says it has %d of %d bytes", h.Len, len(b))
	}
	rest = b[min(int(h.Len+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	return h, b[unix.NLMSG_HDRLEN:h.Len], rest, nil
}

// ackError reads an NLMSG_ERROR: an errno, and the kernel's own words if it has any (NLMSGERR_ATTR_MSG,
// uapi/linux/netlink.h).
func ackError(h unix.NlMsghdr, body []byte) error {
	if len(body) < 4+unix.NLMSG_HDRLEN {
		return errors.New("netlink acknowledgement is too short")
	}
	errno := int32(binary.NativeEndian.Uint32(body))
	if errno == 0 {
		return nil
	}
	err := unix.Errno(-errno)
	if h.Flags&unix.NLM_F_ACK_TLVS == 0 {
		return err
	}
	return withText(err, body[4+unix.NLMSG_HDRLEN:])
}

// doneError reads the end of a dump, which may carry an errno too.
func doneError(body []byte) error {
	if len(body) < 4 {
		return nil
	}
	if errno := int32(binary.NativeEndian.Uint32(body)); errno != 0 {
		return withText(unix.Errno(-errno), body[4:])
	}
	return nil
}

func withText(err unix.Errno, attrs []byte) error {
	text := ""
	eachAttr(attrs, func(typ uint16, data []byte) {
		if typ == unix.NLMSGERR_ATTR_MSG {
			text = cString(data)
		}
	})
	if text == "" {
		return err
	}
	return fmt.Errorf("%w (%s)", err, text)
}
