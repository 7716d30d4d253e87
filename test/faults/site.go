package faults

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/backend/wireguard"
	"github.com/overlayd/overlayd/test/lab"
)

// Site is a lab in which faults are made, with the state that it has to come back to.
type Site struct {
	Lab          *lab.Lab
	Setup        string
	Victim, Peer *lab.Node

	plan     map[string]state     // of each node, by name
	own      lab.SubnetEnv        // the victim's
	vars     addr.Per[[]string]   // "NAME=value" for scripts on the victim
	second   addr.Per[netip.Addr] // the victim's addresses on a second interface
	families []addr.Family
	iptables string
	traffic  traffic
	undo     []Action
	began    time.Time // when the fault was made
	logFrom  int64     // how long the victim's log was then
	facts    map[string]string
	open     []connection
	flannel  []*flanneld // that run, in the order of the nodes

	asked asked // the victim
	whole Check // Whole
}

// asked is a node as an operator sees it; the tests of the runner have one without a lab.
type asked interface {
	Readyz(ctx context.Context) (code int, text string, err error)
	Metrics(ctx context.Context) (string, error)
	Overlayd(ctx context.Context, command string, args ...string) (string, error)
	Doctor(ctx context.Context, more ...string) (string, error)
	Log() string
}

// openSite takes a lab that is up and well.
func openSite(ctx context.Context, l *lab.Lab, setup string, victim, peer int) (s *Site, err error) {
	s = &Site{
		Lab: l, Setup: setup, Victim: l.Node(victim), Peer: l.Node(peer), iptables: "iptables",
		families: l.Topology().Options.Stack.Families(), facts: map[string]string{},
		asked: l.Node(victim), whole: Whole,
	}
	if setup == OnLegacy {
		s.iptables = "iptables-legacy"
	}
	if _, err := s.await(ctx, resting, time.Now(), 20*time.Second); err != nil {
		return nil, fmt.Errorf("wait for the lab to come to rest: %w", err)
	}
	if s.own, err = s.Victim.SubnetEnv(); err != nil {
		return nil, err
	}
	return s, s.everyFamily(func(f addr.Family) error {
		v, err := s.variables(ctx, f)
		s.vars.Set(f, v)
		return err
	})
}

// resting holds when nothing changes any more; what there is then is the plan.
func resting(ctx context.Context, s *Site) (err error) {
	if s.plan, err = s.observe(ctx); err != nil {
		return err
	}
	for name, st := range s.plan {
		if st.settling() {
			return fmt.Errorf("%s: an address is not in use yet", name)
		}
	}
	return errors.Join(sleep(ctx, 300*time.Millisecond), Whole(ctx, s))
}

func (s *Site) observe(ctx context.Context) (map[string]state, error) {
	out := map[string]state{}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range s.Lab.Nodes() {
		g.Go(func() error {
			st, err := observe(ctx, n, s.iptables)
			mu.Lock()
			defer mu.Unlock()
			out[n.Name] = st
			return err
		})
	}
	return out, g.Wait()
}

// Whole holds when every node has the planned state and its daemon reports no problem. Pings that were lost during a
// fault are missed for a while after it, until the peer is pinged again: allContent waits for them, too.
func Whole(ctx context.Context, s *Site) error {
	if err := s.asPlanned(ctx); err != nil {
		return err
	}
	return s.content(ctx)
}

// asPlanned compares the state of every node, but for some sections.
func (s *Site) asPlanned(ctx context.Context, but ...string) error {
	now, err := s.observe(ctx)
	if err != nil {
		return err
	}
	return s.everyNode(func(n *lab.Node) error {
		d := now[n.Name].without(but...).differs(s.plan[n.Name].without(but...))
		return unless(d == "", "%s: %s", n.Name, d)
	})
}

func (s *Site) content(ctx context.Context) error {
	return s.everyNode(func(n *lab.Node) error { return contentOne(ctx, n, "silent-peers", "path-mtu") })
}

func allContent(ctx context.Context, s *Site) error {
	return s.everyNode(func(n *lab.Node) error { return contentOne(ctx, n) })
}

// everyNode calls a function for each node, up to the first error.
func (s *Site) everyNode(f func(*lab.Node) error) error {
	for _, n := range s.Lab.Nodes() {
		if err := f(n); err != nil {
			return err
		}
	}
	return nil
}

// everyFamily calls a function for each family, up to the first error.
func (s *Site) everyFamily(f func(addr.Family) error) error {
	for _, family := range s.families {
		if err := f(family); err != nil {
			return err
		}
	}
	return nil
}

// contentOne asks one daemon; a degraded one is ready, but says more than "ok". Some problems may be allowed.
func contentOne(ctx context.Context, n *lab.Node, but ...string) error {
	_, text, err := n.Readyz(ctx)
	if err != nil {
		return err
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "degraded: "), ":")
		if line != "ok" && !slices.Contains(but, name) {
			return fmt.Errorf("%s says: %s", n.Name, line)
		}
	}
	return nil
}

// isNamed holds when /readyz of the victim has a text in it.
func isNamed(text string) Check {
	return func(ctx context.Context, s *Site) error {
		_, got, err := s.Victim.Readyz(ctx)
		if err != nil {
			return err
		}
		return unless(strings.Contains(got, text), "/readyz does not say %q: %s", text, strings.TrimSpace(got))
	}
}

// Defer has an action done by Undo, or at the end of the row at the latest.
func (s *Site) Defer(a Action) { s.undo = append(s.undo, a) }

// Undo is the Action that does what was deferred, the newest first, also where ctx has ended.
func Undo(ctx context.Context, s *Site) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	for len(s.undo) > 0 {
		last := s.undo[len(s.undo)-1]
		s.undo = s.undo[:len(s.undo)-1]
		errs = append(errs, last(ctx, s))
	}
	return errors.Join(errs...)
}

// variables are what a script on the victim may name, for one family.
func (s *Site) variables(ctx context.Context, f addr.Family) ([]string, error) {
	own, errOwn := s.subnet(s.Victim, f)
	peer, errPeer := s.subnet(s.Peer, f)
	third, errThird := s.subnet(s.otherThan(), f)
	if err := errors.Join(errOwn, errPeer, errThird); err != nil {
		return nil, err
	}
	var backends []string
	for _, n := range s.backends() {
		env, err := n.SubnetEnv()
		if err != nil {
			return nil, err
		}
		backends = append(backends, netip.AddrPortFrom(env.PodAddr(f, 0).Addr(), backendPort).String())
	}
	six := ""
	if f == addr.IPv6 {
		six = "6"
	}
	ip := s.Victim.Addr(f)
	vars := []string{
		fmt.Sprintf("F=-%d", f),
		"DEV=" + s.device(f),
		"NFT_FAMILY=ip" + six,
		"IPT=" + strings.Replace(s.iptables, "ip", "ip"+six, 1),
		"SUBNET=" + own.String(),
		"FIRST=" + own.Addr().String(),
		"IP=" + ip.String(),
		fmt.Sprintf("BITS=%d", ip.BitLen()),
		"PEER_SUBNET=" + peer.String(),
		"PEER_FIRST=" + peer.Addr().String(),
		"PEER_IP=" + s.Peer.Addr(f).String(),
		"TARGET_IP=" + s.otherThan().Addr(f).String(),
		"CLUSTER_IP=" + clusterIP().Get(f).String(),
		"EXTERNAL_IP=" + externalIP(ip).String(),
		"PEER_BACKEND=" + backends[0],
		"THIRD_BACKEND=" + backends[1],
		"POD_IP=" + s.own.PodAddr(f, 0).Addr().String(),
		"DENIED=" + secondary(s.own, f).String(), // a second address of the pod
		"WRONG_GW=" + s.wrongGateway(third, f),
		"SUBNET_FILE=" + s.Victim.SubnetFile(),
		"LOCK=" + s.Lab.XtablesLock(),
		"XTABLES_LOCKFILE=" + s.Lab.XtablesLock(),
		"STATE_DIR=" + s.Victim.StateDir(),
	}
	// An operator would look these up, too: the gateway, the peer's MAC, and the daemon's own table, where it has one.
	out, err := s.Victim.Shell(ctx, `ip $F route show default | sed -n 's/.* via \([^ ]*\).*/GW=\1/p'
		ip $F -o address show dev eth0 scope global | sed -n 's/.*inet6* [^ ]*\/\([^ ]*\) .*/NET_BITS=\1/p'
		ip $F neigh show $PEER_FIRST dev $DEV 2>/dev/null | sed -n 's/.*lladdr \([^ ]*\).*/PEER_MAC=\1/p'
		nft list tables 2>/dev/null | sed -En "s/^table ((inet|$NFT_FAMILY) .*overlayd.*)/NFT_TABLE=\1/p" | head -n 1`,
		vars...)
	return append(vars, strings.Split(strings.TrimSpace(out), "\n")...), err
}

// device is the tunnel's.
func (s *Site) device(f addr.Family) string {
	if s.Setup == OnWireGuard {
		return wireguard.DeviceName(f)
	}
	return vxlan.DeviceName(f, 1)
}

// subnet is a node's subnet in one family.
func (s *Site) subnet(n *lab.Node, f addr.Family) (netip.Prefix, error) {
	env, err := n.SubnetEnv()
	return env.Gateway.Get(f).Masked(), err
}

// wrongGateway is a gateway that the kernel takes for a route to a peer, and which is not the peer.
func (s *Site) wrongGateway(third netip.Prefix, f addr.Family) string {
	if s.Setup == OnHostGW || s.Setup == OnDirect {
		return s.Lab.Topology().Router.Interfaces[2].Addrs[int(f)/6].Addr().String()
	}
	return third.Addr().String()
}

// otherThan is a node that is neither the victim nor the peer.
func (s *Site) otherThan() *lab.Node {
	for _, n := range s.Lab.Nodes() {
		if n != s.Victim && n != s.Peer {
			return n
		}
	}
	return s.Peer
}

// script runs a shell script on a machine, once for each family, with the site's variables.
func (s *Site) script(ctx context.Context, on lab.Machine, text string) error {
	return s.everyFamily(func(f addr.Family) error {
		_, err := on.Shell(ctx, text, s.vars.Get(f)...)
		return err
	})
}

// begin has the fault begin now: what was sent and logged before has nothing to do with it.
func (s *Site) begin() {
	s.began, s.logFrom = time.Now(), int64(len(s.log()))
}

// log is all that the victim's daemon has logged.
func (s *Site) log() string {
	b, _ := os.ReadFile(s.asked.Log()) // without a log nothing was logged
	return string(b)
}

// logged are the lines that the victim's daemon has written since the fault was made.
func (s *Site) logged() []string {
	return strings.Split(strings.TrimSpace(s.log()[s.logFrom:]), "\n")
}

// findLine is the first line that matches, without date and level; "" without one.
func findLine(lines []string, pattern string) string {
	i := slices.IndexFunc(lines, regexp.MustCompile(pattern).MatchString)
	if i < 0 {
		return ""
	}
	fields := strings.Split(lines[i], "\t")
	return strings.Join(fields[min(2, len(fields)-1):], " ")
}

// LogSays holds when a line of the victim's log matches.
func LogSays(pattern string) Check {
	return func(_ context.Context, s *Site) error {
		found := slices.ContainsFunc(s.logged(), regexp.MustCompile(pattern).MatchString)
		return unless(found, "the daemon did not log /%s/", pattern)
	}
}

// logNames holds when the victim's log has the value of a variable in it, for each family.
func logNames(variable string) Check {
	return func(_ context.Context, s *Site) error {
		text := strings.Join(s.logged(), "\n")
		for _, f := range s.families {
			for _, v := range s.vars.Get(f) {
				if value, ok := strings.CutPrefix(v, variable+"="); ok && !strings.Contains(text, value) {
					return fmt.Errorf("the log does not name %s", value)
				}
			}
		}
		return nil
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

const pollEvery = 20 * time.Millisecond

// await calls a check until it holds, and gives up after one that began when the patience was over. It says how long
// after start it held, to within the duration of one call.
func (s *Site) await(ctx context.Context, c Check, start time.Time, patience time.Duration) (time.Duration, error) {
	deadline := start.Add(patience)
	for first := true; ; first = false {
		began := time.Now()
		err := c(ctx, s)
		if err == nil && first { // what it checked last may have been repaired meanwhile
			began = time.Now()
		}
		if err == nil {
			return max(0, began.Sub(start)), nil
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if began.After(deadline) {
			return 0, fmt.Errorf("not within %s: %w", patience, err)
		}
		if err := sleep(ctx, pollEvery); err != nil {
			return 0, err
		}
	}
}
