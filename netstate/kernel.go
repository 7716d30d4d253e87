package netstate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
)

// Kernel is the network state of one network namespace: the one that the thread was in that opened it. It belongs to one
// goroutine.
type Kernel struct {
	conn    *conn
	links   *netlink.Handle
	monitor *monitor
	owned   func(name string) bool

	index map[string]int  // of the links, by name, as of the last look
	cared map[uint32]bool // see expectation
	known *State          // what is in the kernel, so far as we know; nil: look
}

// Open opens the kernel's state. owned tells by its name whether a VXLAN device is ours; what is on such a device is ours too.
func Open(owned func(name string) bool) (*Kernel, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		c.close()
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	m, err := newMonitor()
	if err != nil {
		c.close()
		h.Close()
		return nil, err
	}
	return &Kernel{conn: c, links: h, monitor: m, owned: owned}, nil
}

// Close gives the sockets back. The kernel's state stays as it is.
func (k *Kernel) Close() {
	k.conn.close()
	k.links.Close()
	_ = k.monitor.file.Close()
}

// Watch hears of changes in the kernel until ctx ends, in a goroutine of its own.
func (k *Kernel) Watch(ctx context.Context) error { return k.monitor.run(ctx) }

// Changed gives a value when something in the kernel is no longer as it was last reconciled, or changed in the rest of the host.
// It is a hint to Observe, no more.
func (k *Kernel) Changed() <-chan struct{} { return k.monitor.changed }

// expect tells the monitor what is no surprise.
func (k *Kernel) expect(desired State) {
	e := &expectation{state: desired, names: make(map[uint32]string, len(k.index)), index: map[uint32]string{}, cared: k.cared}
	for name, i := range k.index {
		e.names[uint32(i)] = name
		if k.owned(name) {
			e.index[uint32(i)] = name
		}
	}
	k.monitor.expect.Store(e)
}

// Failure is a change that the kernel refused.
type Failure struct {
	Change
	Err error
}

func (f Failure) Error() string { return fmt.Sprintf("%s: %v", f.Change, f.Err) }

// Unwrap gives the kernel's error.
func (f Failure) Unwrap() error { return f.Err }

// Result is what came of a Reconcile.
type Result struct {
	Done   []Change
	Failed []Failure
}

// rounds bounds how often one Reconcile looks again: a device that was made new or went up takes its entries with it.
const rounds = 3

// Forget makes the next Reconcile look at the kernel instead of believing what it last left there.
func (k *Kernel) Forget() { k.known = nil }

// Reconcile makes the kernel's state the desired one. One object that the kernel refuses holds none of the others back. The error
// says that the kernel could not be looked at: then nothing was changed.
func (k *Kernel) Reconcile(desired State) (Result, error) { return k.reconcile(desired, true) }

// AddMissing is Reconcile without removing what is not desired, for as long as the wish may not be complete.
func (k *Kernel) AddMissing(desired State) (Result, error) { return k.reconcile(desired, false) }

func (k *Kernel) reconcile(desired State, sweep bool) (Result, error) {
	var res Result
	for range rounds {
		if k.known == nil {
			actual, _, err := k.look()
			if err != nil {
				return res, err
			}
			k.known = &actual
		}
		k.expect(desired)
		k.known.Sysctls = readSysctls(desired.Sysctls)
		changes := Diff(*k.known, desired)
		if !sweep {
			changes = withoutSweep(changes)
		}
		if len(changes) == 0 {
			res.Failed = nil
			break
		}
		done, failed := k.apply(changes)
		res.Done, res.Failed = append(res.Done, done...), failed
		k.known = nil
		touchedLinks := slices.ContainsFunc(done, func(c Change) bool { return c.Obj.kind() == kindLink })
		if len(failed) == 0 && !touchedLinks {
			if sweep {
				k.known = new(desired)
			}
			break
		}
		if len(done) == 0 {
			break // looking again would only meet the same refusals
		}
	}
	return res, nil
}

// apply carries the changes out in their order: netlink messages in batches, devices and settings one by one.
func (k *Kernel) apply(changes []Change) (done []Change, failed []Failure) {
	var batch []Change
	var reqs []*nl.NetlinkRequest
	note := func(c Change, err error) {
		if err == nil || c.Op == Delete && isGone(err) {
			done = append(done, c)
		} else {
			failed = append(failed, Failure{c, err})
		}
	}
	flush := func() {
		for i, err := range k.conn.do(reqs) {
			note(batch[i], err)
		}
		batch, reqs = batch[:0], reqs[:0]
	}
	for _, c := range changes {
		switch obj := c.Obj.(type) {
		case Link:
			flush()
			note(c, k.applyLink(c, obj))
		case Sysctl:
			flush()
			note(c, writeSysctl(obj))
		default:
			req, err := k.request(c)
			if err != nil {
				note(c, err)
				continue
			}
			batch, reqs = append(batch, c), append(reqs, req)
		}
	}
	flush()
	return done, failed
}

// isGone: deleting what is not there is no failure.
func isGone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, ErrNoLink)
}

// ErrNoLink is why nothing can be put on a device that could not be made.
var ErrNoLink = errors.New("there is no such device")

// Observe looks at the kernel: it returns the part of the host's network that is not ours, and remembers the part that is for the
// next Reconcile.
func (k *Kernel) Observe() (Host, error) {
	s, h, err := k.look()
	if err != nil {
		k.known = nil
		return Host{}, err
	}
	k.known = &s
	return h, nil
}

// look reads all but the settings: which of those matter is said by the wish.
func (k *Kernel) look() (State, Host, error) {
	var s State
	var h Host
	_, err := os.Stat("/proc/sys/net/ipv6")
	h.IPv6 = err == nil
	names, err := k.observeLinks(&s, &h)
	if err != nil {
		return s, h, fmt.Errorf("reading the devices: %w", err)
	}
	for what, read := range map[string]func(map[int]string, *State, *Host) error{
		"addresses": k.observeAddresses, "routes": k.observeRoutes, "rules": k.observeRules, "neighbours": k.observeNeighbours,
	} {
		if err := read(names, &s, &h); err != nil {
			return s, h, fmt.Errorf("reading the %s: %w", what, err)
		}
	}
	s.Sort()
	k.cared = k.others(s, h)
	return s, h.Indexed(), nil
}

func (k *Kernel) observeLinks(s *State, h *Host) (map[int]string, error) {
	all, err := k.linkList()
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(all))
	k.index = make(map[string]int, len(all))
	for _, l := range all {
		names[l.Attrs().Index] = l.Attrs().Name
		k.index[l.Attrs().Name] = l.Attrs().Index
	}
	for _, l := range all {
		a := l.Attrs()
		hl := HostLink{Index: a.Index, Name: a.Name, MTU: a.MTU, Up: a.RawFlags&unix.IFF_UP != 0, Loopback: a.RawFlags&unix.IFF_LOOPBACK != 0}
		if v, ok := l.(*netlink.Vxlan); ok {
			hl.VXLAN = vxlanOf(v, names)
			if k.owned(a.Name) {
				s.Links = append(s.Links, Link{Name: a.Name, VXLAN: hl.VXLAN, MAC: macOf(a.HardwareAddr), MTU: a.MTU, Down: !hl.Up})
			}
		} else if k.owned(a.Name) {
			delete(k.index, a.Name) // somebody else's, in the way of ours: nothing is put on it
		}
		h.Links = append(h.Links, hl)
	}
	return names, nil
}

func (k *Kernel) linkList() ([]netlink.Link, error) {
	for range dumpTries {
		all, err := k.links.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return nil, errInterrupted
}

func (k *Kernel) observeAddresses(names map[int]string, s *State, h *Host) error {
	const fleeting = unix.IFA_F_TEMPORARY | unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	var all []netlink.Addr
	err := error(netlink.ErrDumpInterrupted)
	for i := 0; i < dumpTries && errors.Is(err, netlink.ErrDumpInterrupted); i++ {
		all, err = k.links.AddrList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		return err
	}
	for _, a := range all {
		ip, _ := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		bits, _ := a.Mask.Size()
		name, p := names[a.LinkIndex], netip.PrefixFrom(ip, bits)
		h.Addresses = append(h.Addresses, HostAddress{Link: name, Prefix: p, Fleeting: a.Flags&fleeting != 0, Tunnel: k.ours(s, name)})
		if k.ours(s, name) && !ip.IsLinkLocalUnicast() {
			s.Addresses = append(s.Addresses, Address{Link: name, Prefix: p})
		}
	}
	return nil
}

// others lists the links by number that are not ours and carry an address or a route.
func (k *Kernel) others(s State, h Host) map[uint32]bool {
	out := map[uint32]bool{}
	note := func(link string) {
		if i, ok := k.index[link]; ok && !k.ours(&s, link) {
			out[uint32(i)] = true
		}
	}
	for _, a := range h.Addresses {
		if !a.Prefix.Addr().IsLinkLocalUnicast() {
			note(a.Link)
		}
	}
	for _, r := range h.Routes {
		if !r.Dst.Addr().IsLinkLocalUnicast() {
			note(r.Link)
		}
	}
	return out
}

// ours reports whether a link is one of those that were observed as ours.
func (k *Kernel) ours(s *State, name string) bool {
	return slices.ContainsFunc(s.Links, func(l Link) bool { return l.Name == name })
}

func (k *Kernel) observeRoutes(names map[int]string, s *State, h *Host) error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		routes, host := len(s.Routes), len(h.Routes)
		header := nl.NewRtMsg()
		header.RtMsg = unix.RtMsg{Family: family}
		err := k.conn.dump(unix.RTM_GETROUTE, header, nil, func() {
			s.Routes, h.Routes = s.Routes[:routes], h.Routes[:host]
		}, func(b []byte) {
			r, ok := parseRoute(b)
			if !ok || r.kind != unix.RTN_UNICAST {
				return
			}
			r.Link = names[int(r.oif)]
			switch {
			case r.protocol == Protocol:
				s.Routes = append(s.Routes, r.Route)
			case r.Table == MainTable:
				h.Routes = append(h.Routes, HostRoute{Dst: r.Dst, Via: r.Via, Link: r.Link, Metric: r.Metric, Advertised: r.protocol == unix.RTPROT_RA})
			}
		})
		if err != nil && !noFamily(err) {
			return err
		}
	}
	return nil
}

func (k *Kernel) observeRules(_ map[int]string, s *State, _ *Host) error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		before := len(s.Rules)
		header := nl.NewRtMsg()
		header.RtMsg = unix.RtMsg{Family: family}
		err := k.conn.dump(unix.RTM_GETRULE, header, nil, func() { s.Rules = s.Rules[:before] }, func(b []byte) {
			if r, protocol, ok := parseRule(b); ok && protocol == Protocol {
				s.Rules = append(s.Rules, r)
			}
		})
		if err != nil && !noFamily(err) {
			return err
		}
	}
	return nil
}

func (k *Kernel) observeNeighbours(names map[int]string, s *State, _ *Host) error {
	for _, l := range s.Links {
		ifindex := uint32(k.index[l.Name])
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			before := len(s.Neighbours)
			filter := nl.NewRtAttr(unix.NDA_IFINDEX, nl.Uint32Attr(ifindex))
			err := k.conn.dump(unix.RTM_GETNEIGH, &netlink.Ndmsg{Family: family}, []*nl.RtAttr{filter}, func() {
				s.Neighbours = s.Neighbours[:before]
			}, func(b []byte) {
				if n, at, ok := parseNeighbour(b); ok && at == ifindex { // an older kernel does not filter
					n.Link = names[int(at)]
					s.Neighbours = append(s.Neighbours, n)
				}
			})
			if err != nil && !noFamily(err) {
				return err
			}
		}
		before := len(s.FDB)
		err := k.conn.dump(unix.RTM_GETNEIGH, &netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: ifindex}, nil, func() {
			s.FDB = s.FDB[:before]
		}, func(b []byte) {
			if e, at, ok := parseFDB(b); ok && at == ifindex {
				e.Link = names[int(at)]
				s.FDB = append(s.FDB, e)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// noFamily: a kernel started without IPv6 has no such tables, which is as good as empty ones.
func noFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// readSysctls reads the settings that are wished for; one that can't be read is missing.
func readSysctls(wish []Sysctl) []Sysctl {
	var out []Sysctl
	for _, w := range wish {
		if v, err := os.ReadFile(filepath.Join("/proc/sys", w.Path)); err == nil {
			out = append(out, Sysctl{w.Path, strings.TrimSpace(string(v))})
		}
	}
	return out
}

func writeSysctl(s Sysctl) error {
	err := os.WriteFile(filepath.Join("/proc/sys", s.Path), []byte(s.Value), 0)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w (set it on the host: sysctl -w %s=%s)", err, strings.ReplaceAll(s.Path, "/", "."), s.Value)
	}
	return err
}

// request is the netlink message for a change of an address, neighbour, FDB entry, route or rule.
func (k *Kernel) request(c Change) (*nl.NetlinkRequest, error) {
	switch obj := c.Obj.(type) {
	case Address:
		return k.addressRequest(c.Op, obj)
	case Neighbour:
		return k.neighbourRequest(c.Op, obj.Link, familyOf(obj.IP), 0, obj.MAC, obj.IP)
	case FDBEntry:
		return k.neighbourRequest(c.Op, obj.Link, unix.AF_BRIDGE, unix.NTF_SELF, obj.MAC, obj.Dst)
	case Route:
		return k.routeRequest(c.Op, obj)
	case Rule:
		return ruleRequest(c.Op, obj), nil
	}
	return nil, fmt.Errorf("no message is known for a %s", c.Kind())
}

// newRequest starts a message. An Add must not meet anything: what is there under our key but not in our observation is
// somebody else's, or came since.
func newRequest(op Op, add, del int) *nl.NetlinkRequest {
	switch op {
	case Add:
		return nl.NewNetlinkRequest(add, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	case Replace:
		return nl.NewNetlinkRequest(add, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	default:
		return nl.NewNetlinkRequest(del, 0)
	}
}

func (k *Kernel) linkIndex(name string) (uint32, error) {
	if i, ok := k.index[name]; ok {
		return uint32(i), nil
	}
	return 0, fmt.Errorf("%w as %s", ErrNoLink, name)
}

func (k *Kernel) addressRequest(op Op, a Address) (*nl.NetlinkRequest, error) {
	ifindex, err := k.linkIndex(a.Link)
	if err != nil {
		return nil, err
	}
	req := newRequest(op, unix.RTM_NEWADDR, unix.RTM_DELADDR)
	msg := nl.NewIfAddrmsg(int(familyOf(a.Prefix.Addr())))
	msg.Index, msg.Prefixlen = ifindex, uint8(a.Prefix.Bits())
	msg.Flags = unix.IFA_F_NODAD | unix.IFA_F_PERMANENT
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, a.Prefix.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, a.Prefix.Addr().AsSlice()))
	return req, nil
}

func (k *Kernel) neighbourRequest(op Op, link string, family, flags uint8, mac addr.MAC, dst netip.Addr) (*nl.NetlinkRequest, error) {
	ifindex, err := k.linkIndex(link)
	if err != nil {
		return nil, err
	}
	if op == Add {
		// All entries on our device are ours, also one that the kernel made while nobody had told it better.
		op = Replace
	}
	req := newRequest(op, unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH)
	req.AddData(&netlink.Ndmsg{Family: family, Index: ifindex, State: unix.NUD_PERMANENT, Flags: flags})
	req.AddData(nl.NewRtAttr(unix.NDA_DST, dst.AsSlice()))
	req.AddData(nl.NewRtAttr(unix.NDA_LLADDR, mac[:]))
	return req, nil
}

func (k *Kernel) routeRequest(op Op, r Route) (*nl.NetlinkRequest, error) {
	ifindex, err := k.linkIndex(r.Link)
	if err != nil && op != Delete {
		return nil, err
	}
	req := newRequest(op, unix.RTM_NEWROUTE, unix.RTM_DELROUTE)
	msg := nl.NewRtMsg()
	msg.RtMsg = unix.RtMsg{
		Family: familyOf(r.Dst.Addr()), Dst_len: uint8(r.Dst.Bits()), Table: uint8(r.Table),
		Protocol: Protocol, Type: unix.RTN_UNICAST, Scope: unix.RT_SCOPE_UNIVERSE,
	}
	if !r.Via.IsValid() {
		msg.Scope = unix.RT_SCOPE_LINK
	}
	if op == Delete {
		msg.Scope = unix.RT_SCOPE_NOWHERE // any
	}
	if r.OnLink {
		msg.Flags = unix.RTNH_F_ONLINK
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.RTA_DST, r.Dst.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.RTA_PRIORITY, nl.Uint32Attr(r.Metric)))
	if r.Table > math.MaxUint8 { // only one to be deleted
		req.AddData(nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(r.Table)))
	}
	if r.Via.IsValid() {
		req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, r.Via.AsSlice()))
	}
	if ifindex != 0 {
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(ifindex)))
	}
	return req, nil
}

func ruleRequest(op Op, r Rule) *nl.NetlinkRequest {
	const actionToTable = 1 // FR_ACT_TO_TBL
	req := newRequest(op, unix.RTM_NEWRULE, unix.RTM_DELRULE)
	msg := nl.NewRtMsg() // struct fib_rule_hdr has the layout of struct rtmsg
	msg.RtMsg = unix.RtMsg{
		Family: familyOf(r.From.Addr()), Src_len: uint8(r.From.Bits()), Table: uint8(r.Table), Type: actionToTable,
	}
	req.AddData(msg)
	if r.From.Bits() > 0 {
		req.AddData(nl.NewRtAttr(unix.FRA_SRC, r.From.Addr().AsSlice()))
	}
	if r.Table > math.MaxUint8 {
		req.AddData(nl.NewRtAttr(unix.FRA_TABLE, nl.Uint32Attr(r.Table)))
	}
	req.AddData(nl.NewRtAttr(unix.FRA_PRIORITY, nl.Uint32Attr(r.Priority)))
	req.AddData(nl.NewRtAttr(unix.FRA_PROTOCOL, []byte{Protocol}))
	return req
}

func familyOf(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
