package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/overlayd/overlayd/addr"
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
	mark     int64 // where the victim's log stood when the fault began
	facts    map[string]string
}

// openSite looks at a lab that is up and well.
func openSite(ctx context.Context, l *lab.Lab, setup string, victim, peer int) (*Site, error) {
	s := &Site{
		Lab: l, Setup: setup, Victim: l.Node(victim), Peer: l.Node(peer), iptables: "iptables",
		families: l.Topology().Options.Stack.Families(), facts: map[string]string{},
	}
	if setup == OnLegacy {
		s.iptables = "iptables-legacy"
	}
	if err := s.calm(ctx); err != nil {
		return nil, err
	}
	var err error
	if s.own, err = s.Victim.SubnetEnv(); err != nil {
		return nil, err
	}
	for _, f := range s.families {
		v, err := s.variables(ctx, f)
		if err != nil {
			return nil, err
		}
		s.vars.Set(f, v)
	}
	return s, nil
}

// calm waits until nothing changes any more, and takes that for the plan.
func (s *Site) calm(ctx context.Context) error {
	resting := func(ctx context.Context, s *Site) (err error) {
		if s.plan, err = s.observe(ctx); err != nil {
			return err
		}
		for name, st := range s.plan {
			if st.settling() {
				return fmt.Errorf("%s: an address is not in use yet", name)
			}
		}
		return errors.Join(sleep(ctx, 300*time.Millisecond), s.whole(ctx))
	}
	if _, err := s.await(ctx, resting, time.Now(), 20*time.Second); err != nil {
		return fmt.Errorf("wait for the lab to come to rest: %w", err)
	}
	return nil
}

func (s *Site) observe(ctx context.Context) (map[string]state, error) {
	nodes := s.Lab.Nodes()
	states := make([]state, len(nodes))
	g, ctx := errgroup.WithContext(ctx)
	for i, n := range nodes {
		g.Go(func() (err error) {
			states[i], err = observe(ctx, n, s.iptables)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	out := map[string]state{}
	for i, n := range nodes {
		out[n.Name] = states[i]
	}
	return out, nil
}

// whole says in what the lab is not as planned: the kernel state, or what the daemons say of themselves.
func (s *Site) whole(ctx context.Context) error {
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

// content asks every daemon whether it is content, but for the pings: those that were lost during a fault are missed for a while
// after it, until the peer is asked again.
func (s *Site) content(ctx context.Context) error {
	return s.everyNode(func(n *lab.Node) error { return contentOne(ctx, n, "silent-peers", "path-mtu") })
}

// allContent holds when every daemon is content with the pings, too.
func allContent(ctx context.Context, s *Site) error {
	return s.everyNode(func(n *lab.Node) error { return contentOne(ctx, n) })
}

// everyNode does something with each node, up to the first error.
func (s *Site) everyNode(f func(*lab.Node) error) error {
	for _, n := range s.Lab.Nodes() {
		if err := f(n); err != nil {
			return err
		}
	}
	return nil
}

// contentOne asks one daemon; a degraded one is ready, but says more than "ok". Some problems may be passed over.
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

// Defer has something done by Undo, or at the end of the row at the latest.
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
	own, errOwn := s.Victim.SubnetEnv()
	peer, errPeer := s.Peer.SubnetEnv()
	third, errThird := s.otherThan().SubnetEnv()
	if err := errors.Join(errOwn, errPeer, errThird); err != nil {
		return nil, err
	}
	six, device := "", "overlay.1"
	if f == addr.IPv6 {
		six, device = "6", "overlay-v6.1"
	}
	subnet := func(e lab.SubnetEnv) netip.Prefix { return e.Gateway.Get(f).Masked() }
	vars := []string{
		fmt.Sprintf("F=-%d", f),
		"DEV=" + device,
		"NFT_FAMILY=ip" + six,
		"IPT=" + strings.Replace(s.iptables, "ip", "ip"+six, 1),
		"SUBNET=" + subnet(own).String(),
		"FIRST=" + subnet(own).Addr().String(),
		"IP=" + s.Victim.Addr(f).String(),
		fmt.Sprintf("BITS=%d", s.Victim.Addr(f).BitLen()),
		"PEER_SUBNET=" + subnet(peer).String(),
		"PEER_FIRST=" + subnet(peer).Addr().String(),
		"PEER_IP=" + s.Peer.Addr(f).String(),
		"TARGET_IP=" + s.otherThan().Addr(f).String(),
		"POD_IP=" + own.PodAddr(f, 0).Addr().String(),
		"DENIED=" + secondary(own, f).String(), // a second address of the pod
		"WRONG_GW=" + s.wrongGateway(subnet(third), f),
		"SUBNET_FILE=" + s.Victim.SubnetFile(),
		"LOCK=" + s.Lab.XtablesLock(),
		"XTABLES_LOCKFILE=" + s.Lab.XtablesLock(),
		"STATE_DIR=" + s.Victim.StateDir(),
	}
	host := s.Victim.Spec().Host
	for _, r := range host.Routes {
		if addr.FamilyOf(r.Via) == f {
			vars = append(vars, "GW="+r.Via.String())
		}
	}
	for _, p := range host.Interfaces[0].Addrs {
		if addr.FamilyOf(p.Addr()) == f {
			vars = append(vars, fmt.Sprintf("NET_BITS=%d", p.Bits()))
		}
	}
	// The MAC is looked up, as an operator would; and the name of the daemon's own table, where it has one.
	out, err := s.Victim.Shell(ctx, `ip $F neigh show $PEER_FIRST dev $DEV 2>/dev/null | sed -n 's/.*lladdr \([^ ]*\).*/PEER_MAC=\1/p'
		nft list tables 2>/dev/null | sed -En "s/^table ((inet|$NFT_FAMILY) .*overlayd.*)/NFT_TABLE=\1/p" | head -n 1`, vars...)
	for line := range strings.Lines(out) {
		vars = append(vars, strings.TrimSpace(line))
	}
	return vars, err
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
	for _, f := range s.families {
		if _, err := on.Shell(ctx, text, s.vars.Get(f)...); err != nil {
			return err
		}
	}
	return nil
}

// markLog remembers where the victim's log stands.
func (s *Site) markLog() error {
	info, err := os.Stat(s.Victim.Log())
	if err != nil {
		return fmt.Errorf("the log of %s: %w", s.Victim.Name, err)
	}
	s.mark = info.Size()
	return nil
}

// logged are the lines that the victim's daemon wrote since the mark.
func (s *Site) logged() []string { return s.linesFrom(s.mark) }

func (s *Site) linesFrom(offset int64) []string {
	b, err := os.ReadFile(s.Victim.Log())
	if err != nil || int64(len(b)) < offset {
		return nil
	}
	text := string(bytes.TrimSpace(b[offset:]))
	if text == "" {
		return nil
	}
	return strings.Split(text, "\n")
}

// loggedBefore are the lines from so long ago that the daemon need not say the same again: one line per kind and minute.
func (s *Site) loggedBefore() []string {
	var out []string
	since := time.Now().Add(-75 * time.Second)
	for _, l := range s.linesFrom(0) {
		stamp, _, _ := strings.Cut(l, "\t")
		if at, err := time.Parse("2006-01-02T15:04:05.000Z0700", stamp); err == nil && at.After(since) {
			out = append(out, l)
		}
	}
	return out
}

// findLine is the first line that matches, without its date.
func findLine(lines []string, pattern *regexp.Regexp) (string, bool) {
	for _, l := range lines {
		if pattern.MatchString(l) {
			return message(l), true
		}
	}
	return "", false
}

func matchesAny(lines []string, pattern string) bool {
	_, ok := findLine(lines, regexp.MustCompile(pattern))
	return ok
}

// message is a log line without date and level.
func message(line string) string {
	fields := strings.Split(line, "\t")
	if len(fields) > 2 {
		fields = fields[2:]
	}
	return strings.Join(fields, " ")
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

const lookEvery = 20 * time.Millisecond

// await calls a check until it holds, and gives up after one that began when the patience was over. It says how long after start it
// held, to within the time of one look.
func (s *Site) await(ctx context.Context, c Check, start time.Time, patience time.Duration) (time.Duration, error) {
	deadline := start.Add(patience)
	for first := true; ; first = false {
		began := time.Now()
		err := c(ctx, s)
		if err == nil && first { // what it looked at last may have been put right while it looked
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
		if err := sleep(ctx, lookEvery); err != nil {
			return 0, err
		}
	}
}
