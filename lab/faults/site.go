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
	"github.com/overlayd/overlayd/lab"
)

// Site is a lab in which faults are made, with the state that it has to come back to.
type Site struct {
	Lab          *lab.Lab
	Setup        string
	Victim, Peer *lab.Node

	plan     map[string]state     // of each node, by name
	own      lab.SubnetEnv        // the victim's
	vars     addr.Per[string]     // shell variables for scripts on the victim
	second   addr.Per[netip.Addr] // the victim's addresses on a second interface
	families []addr.Family
	iptables string
	traffic  traffic
	undo     []func() error
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
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var err error
	if s.plan, err = s.observe(ctx); err != nil {
		return err
	}
	for {
		if err := sleep(ctx, 300*time.Millisecond); err != nil {
			return fmt.Errorf("wait for the lab to come to rest: %w", err)
		}
		if !s.settling() && s.whole(ctx) == nil {
			return nil
		}
		if s.plan, err = s.observe(ctx); err != nil {
			return err
		}
	}
}

func (s *Site) settling() bool {
	for _, st := range s.plan {
		if st.settling() {
			return true
		}
	}
	return false
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
	for _, n := range s.Lab.Nodes() {
		if d := now[n.Name].without(but...).differs(s.plan[n.Name].without(but...)); d != "" {
			return fmt.Errorf("%s: %s", n.Name, d)
		}
	}
	return nil
}

// content asks every daemon whether it is content, but for the pings: those that were lost during a fault are missed for a while
// after it, until the peer is asked again.
func (s *Site) content(ctx context.Context) error {
	for _, n := range s.Lab.Nodes() {
		if err := contentOne(ctx, n, "silent-peers", "path-mtu"); err != nil {
			return err
		}
	}
	return nil
}

// pinged holds when every daemon is content with the pings, too.
func (s *Site) pinged(ctx context.Context) error {
	for _, n := range s.Lab.Nodes() {
		if err := contentOne(ctx, n); err != nil {
			return err
		}
	}
	return nil
}

// contentOne asks one daemon; a degraded one is ready, but says more than "ok". Some problems may be passed over.
func contentOne(ctx context.Context, n *lab.Node, but ...string) error {
	text, err := n.Get(ctx, "http://127.0.0.1:8471/readyz")
	if err != nil {
		return err
	}
	for line := range strings.Lines(text) {
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "degraded: "), ":")
		if line = strings.TrimSpace(line); line != "ok" && !slices.Contains(but, name) {
			return fmt.Errorf("%s says: %s", n.Name, line)
		}
	}
	return nil
}

// Defer has something undone by Undo, or at the end of the row at the latest.
func (s *Site) Defer(f func() error) { s.undo = append(s.undo, f) }

// Undo is the Action that undoes what was deferred, the newest first.
func Undo(_ context.Context, s *Site) error {
	var errs []error
	for len(s.undo) > 0 {
		last := s.undo[len(s.undo)-1]
		s.undo = s.undo[:len(s.undo)-1]
		errs = append(errs, last())
	}
	return errors.Join(errs...)
}

// variables are what a script on the victim may name, for one family.
func (s *Site) variables(ctx context.Context, f addr.Family) (string, error) {
	own, errOwn := s.Victim.SubnetEnv()
	peer, errPeer := s.Peer.SubnetEnv()
	third, errThird := s.otherThan().SubnetEnv()
	if err := errors.Join(errOwn, errPeer, errThird); err != nil {
		return "", err
	}
	host := s.Victim.Spec().Host
	gateway := ""
	for _, r := range host.Routes {
		if addr.FamilyOf(r.Via) == f {
			gateway = r.Via.String()
		}
	}
	six, device := "", "overlay.1"
	if f == addr.IPv6 {
		six, device = "6", "overlay-v6.1"
	}
	vars := []string{
		"F=-" + fmt.Sprint(uint8(f)),
		"DEV=" + device,
		"NFT_FAMILY=ip" + six,
		"IPT=" + strings.Replace(s.iptables, "ip", "ip"+six, 1),
		"SUBNET=" + own.Gateway.Get(f).Masked().String(),
		"FIRST=" + own.Gateway.Get(f).Masked().Addr().String(),
		"IP=" + s.Victim.Addr(f).String(),
		"GW=" + gateway,
		"BITS=" + fmt.Sprint(s.Victim.Addr(f).BitLen()),
		"PEER_SUBNET=" + peer.Gateway.Get(f).Masked().String(),
		"PEER_FIRST=" + peer.Gateway.Get(f).Masked().Addr().String(),
		"PEER_IP=" + s.Peer.Addr(f).String(),
		"TARGET_IP=" + s.otherThan().Addr(f).String(),
		"WRONG_GW=" + s.wrongGateway(third, f),
		"SUBNET_FILE=" + s.Victim.SubnetFile(),
		"LOCK=" + lockFile(s.Lab.Topology().Options.Name),
		"export XTABLES_LOCKFILE=$LOCK",
		"STATE_DIR=" + s.Victim.StateDir(),
	}
	for _, p := range host.Interfaces[0].Addrs {
		if addr.FamilyOf(p.Addr()) == f {
			vars = append(vars, "NET_BITS="+fmt.Sprint(p.Bits()))
		}
	}
	script := strings.Join(vars, "\n") + "\n"
	// The MAC is looked up, as an operator would; and the name of the daemon's own table, where it has one.
	out, err := s.Victim.Run(ctx, "sh", "-c", script+
		`ip $F neigh show $PEER_FIRST dev $DEV 2>/dev/null | sed -n 's/.*lladdr \([^ ]*\).*/PEER_MAC=\1/p'
		 nft list tables 2>/dev/null | grep -E "^table (inet|$NFT_FAMILY) .*overlayd" | sed -n 's/^table \(.*\)/NFT_TABLE="\1"/p' | head -n 1`)
	return script + out, err
}

// wrongGateway is a gateway that the kernel takes for a route to a peer, and which is not the peer.
func (s *Site) wrongGateway(third lab.SubnetEnv, f addr.Family) string {
	if s.Setup == OnHostGW || s.Setup == OnDirect {
		return s.Lab.Topology().Router.Interfaces[2].Addrs[int(f)/6].Addr().String()
	}
	return third.Gateway.Get(f).Masked().Addr().String()
}

// lockFile is the lab's own xtables lock, so that holding it blocks nobody else on this machine.
func lockFile(name string) string { return "/run/overlay-lab/" + name + "/xtables.lock" }

// otherThan is a node that is neither the victim nor the peer.
func (s *Site) otherThan() *lab.Node {
	for _, n := range s.Lab.Nodes() {
		if n != s.Victim && n != s.Peer {
			return n
		}
	}
	return s.Peer
}

// script runs a shell script on the victim, once for each family.
func (s *Site) script(ctx context.Context, text string) error {
	for _, f := range s.families {
		out, err := s.Victim.Run(ctx, "sh", "-ec", s.vars.Get(f)+text)
		if err != nil {
			return fmt.Errorf("%s: %q: %w (%s)", s.Victim.Name, strings.TrimSpace(text), exitOnly(err), strings.TrimSpace(out))
		}
	}
	return nil
}

// exitOnly drops the script's text from an error that would carry it twice.
func exitOnly(err error) error {
	for inner := err; inner != nil; inner = errors.Unwrap(inner) {
		if strings.HasPrefix(inner.Error(), "exit status") {
			return inner
		}
	}
	return err
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
	re, err := regexp.Compile(pattern)
	if err != nil {
		return false
	}
	_, ok := findLine(lines, re)
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
