package rows

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
	"github.com/overlayd/overlayd/test/kubernetes/nodes"
)

// place is where netcheck can be run: a pod or a host.
type place struct {
	name string
	self string // the name with which a server there answers
	node string // "" where it is none
	ips  []netip.Addr
	cmd  func(ctx context.Context, args ...string) (*exec.Cmd, error)
}

func (p place) run(ctx context.Context, args ...string) (string, error) {
	c, err := p.cmd(ctx, args...)
	if err != nil {
		return "", err
	}
	out, err := nodes.Output(c)
	return strings.TrimSpace(out), err
}

func (s *Suite) host(h *nodes.Host, node string) place {
	return place{
		"host " + h.Name, h.Name, node,
		[]netip.Addr{h.IP, h.IP6},
		func(ctx context.Context, args ...string) (*exec.Cmd, error) {
			return h.Command(ctx, append([]string{s.K.Netcheck}, args...)...), nil
		},
	}
}

func (s *Suite) hosts() []place {
	var out []place
	for _, n := range s.K.Nodes {
		out = append(out, s.host(n.Host, n.Name))
	}
	return out
}

func (s *Suite) internet() place { return s.host(s.K.Lab.Internet, "") }

// podList is what is needed of a list of pods.
type podList struct {
	Items []struct {
		Metadata struct {
			Name, UID         string
			DeletionTimestamp *string
		}
		Spec   struct{ NodeName string }
		Status struct {
			PodIPs     []struct{ IP netip.Addr }
			Conditions []struct{ Type, Status string }
		}
	}
}

// pods returns the pods of an app, of which there must be so many, all ready.
func (s *Suite) pods(ctx context.Context, app string, count int) ([]place, error) {
	var out []place
	return out, cluster.Poll(ctx, fmt.Sprintf("%d pods of %s", count, app), func() error {
		out = nil
		var list podList
		if err := s.K.Get(ctx, &list, cluster.Namespace("default")+"/pods?labelSelector=app%3D"+app); err != nil {
			return err
		}
		var waiting []string
		for _, p := range list.Items {
			ready := false
			for _, c := range p.Status.Conditions {
				ready = ready || c.Type == "Ready" && c.Status == "True"
			}
			if !ready || p.Metadata.DeletionTimestamp != nil {
				waiting = append(waiting, p.Metadata.Name)
				continue
			}
			n, err := s.K.Node(p.Spec.NodeName)
			if err != nil {
				return err
			}
			uid := p.Metadata.UID
			there := place{
				name: p.Metadata.Name, self: p.Metadata.Name, node: n.Name,
				cmd: func(ctx context.Context, args ...string) (*exec.Cmd, error) {
					return n.InPod(ctx, uid, append([]string{"/netcheck"}, args...)...)
				},
			}
			for _, ip := range p.Status.PodIPs {
				there.ips = append(there.ips, ip.IP)
			}
			if len(there.ips) != 2 {
				return fmt.Errorf("%s should have an address of each family, and has %v", there.name, there.ips)
			}
			out = append(out, there)
		}
		if len(out) != count || len(waiting) > 0 {
			return fmt.Errorf("%d are ready, and not ready are: %s", len(out), strings.Join(waiting, " "))
		}
		return nil
	})
}

// workload returns the clients and the servers, one of each on every node.
func (s *Suite) workload(ctx context.Context) (clients, servers []place, err error) {
	if clients, err = s.pods(ctx, "client", len(s.K.Nodes)); err != nil {
		return nil, nil, err
	}
	servers, err = s.pods(ctx, "server", len(s.K.Nodes))
	return clients, servers, err
}

// answer is what a server said, and what the client knows.
type answer struct{ server, seen, own string }

// from fails where another server answered than the one that should, or saw another address than the client's own.
func (a answer) from(server string) error {
	switch {
	case a.server != server:
		return fmt.Errorf("%s answered, not %s", a.server, server)
	case a.seen != a.own:
		return fmt.Errorf("asked as %s and was seen as %s", a.own, a.seen)
	}
	return nil
}

// The ways to ask, as netcheck calls them.
const (
	tcp = "get"
	udp = "udp"
)

// ask lets a place ask addresses with ports, one after the other.
func ask(ctx context.Context, from place, how string, to ...string) ([]answer, error) {
	args := []string{how}
	for _, a := range to {
		if how == tcp {
			a = "http://" + a + "/"
		}
		args = append(args, a)
	}
	out, err := from.run(ctx, args...)
	if err != nil {
		return nil, err
	}
	return parse(out, len(to))
}

// askOne is ask for one address over TCP.
func askOne(ctx context.Context, from place, to string) (answer, error) {
	all, err := ask(ctx, from, tcp, to)
	if err != nil {
		return answer{}, err
	}
	return all[0], nil
}

func parse(text string, count int) (out []answer, err error) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 3 {
			return nil, fmt.Errorf("expected three words, got %q", line)
		}
		out = append(out, answer{f[0], f[1], f[2]})
	}
	if len(out) != count {
		err = fmt.Errorf("expected %d answers, got %q", count, text)
	}
	return out, err
}

func port(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }

// untranslated asks over TCP and UDP and pings, in each family, and fails where an address was translated on the way.
func untranslated(ctx context.Context, from, to place, toPort uint16) error {
	var errs []error
	for _, ip := range to.ips {
		for what, how := range map[string]string{"TCP": tcp, "UDP": udp} {
			a, err := ask(ctx, from, how, port(ip, toPort))
			if err == nil {
				err = a[0].from(to.self)
			}
			errs = append(errs, wrap(err, "%s of %s to %s of %s", what, from.where(), ip, to.where()))
		}
		lost, err := ping(ctx, from, ip, "-n", "5")
		if err == nil && lost > 0 {
			err = fmt.Errorf("lost %d of 5 pings", lost)
		}
		errs = append(errs, wrap(err, "%s to %s of %s", from.where(), ip, to.where()))
	}
	return errors.Join(errs...)
}

func (p place) where() string {
	if p.node == "" || strings.HasSuffix(p.name, " "+p.node) {
		return p.name
	}
	return p.name + " on " + p.node
}

func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(format+": %w", append(args, err)...)
}

// ping returns how many were lost.
func ping(ctx context.Context, from place, to netip.Addr, args ...string) (int, error) {
	out, err := from.run(ctx, append(append([]string{"ping"}, args...), to.String())...)
	if err != nil {
		return 0, err
	}
	_, lost, err := parsePing(out)
	return lost, err
}

func parsePing(out string) (sent, lost int, err error) {
	_, err = fmt.Sscanf(out, "sent %d lost %d", &sent, &lost)
	return sent, lost, wrap(err, "%q", out)
}

// pings are running pings, from every client to every server of another list, in each family.
type pings struct {
	running []*running
}

type running struct {
	name  string
	cmd   *exec.Cmd
	stdin io.Closer
	out   *strings.Builder
}

func startPings(ctx context.Context, from, to []place) (*pings, error) {
	p := &pings{}
	for _, f := range from {
		for _, t := range to {
			for _, ip := range t.ips {
				cmd, err := f.cmd(ctx, "ping", "-every", "50ms", ip.String())
				if err != nil {
					return p, err
				}
				stdin, err := cmd.StdinPipe()
				if err != nil {
					return p, err
				}
				r := &running{f.where() + " to " + ip.String() + " on " + t.node, cmd, stdin, &strings.Builder{}}
				cmd.Stdout, cmd.Stderr = r.out, r.out
				if err := cmd.Start(); err != nil {
					return p, err
				}
				p.running = append(p.running, r)
			}
		}
	}
	return p, nil
}

// stop ends them and returns how many packets were lost. Where some were, the error says on which paths.
func (p *pings) stop() (int, error) {
	total := 0
	var errs []error
	for _, r := range p.running {
		_ = r.stdin.Close()
	}
	for _, r := range p.running {
		err := r.cmd.Wait()
		sent, lost, parseErr := parsePing(r.out.String())
		total += lost
		switch err = errors.Join(err, parseErr); {
		case err != nil:
			errs = append(errs, wrap(err, "%s", r.name))
		case sent < 10:
			errs = append(errs, fmt.Errorf("%s: only %d pings were sent", r.name, sent))
		case lost > 0:
			errs = append(errs, fmt.Errorf("%s: %s", r.name, strings.TrimSpace(r.out.String())))
		}
	}
	return total, errors.Join(errs...)
}

// under runs f while every client pings every server, and returns how many pings were lost.
func under(ctx context.Context, from, to []place, f func() error) (int, error) {
	p, err := startPings(ctx, from, to)
	if err == nil && len(p.running) == 0 {
		err = errors.New("there is nobody to ping, or to be pinged")
	}
	if err == nil {
		err = f()
	}
	lost, lossErr := p.stop()
	return lost, errors.Join(err, lossErr)
}
