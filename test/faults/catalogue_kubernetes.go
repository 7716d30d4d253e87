package faults

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/test/lab"
)

// kubernetesFaults are those of the Kubernetes API as the store.
func kubernetesFaults() []Fault {
	rows := []Fault{
		{
			// As Documentation/leases.md has it.
			Name: "moved from flannel, node by node", On: []string{OnFlannel},
			Inject: Steps(becomeFlannel, moveAll), Bound: Bound{Lost: Any, Every: true, Repair: comeBack},
			Log: `condition failed.*"kernel".*flannel`,
		},
		{
			Name: "another annotation prefix, node by node", On: []string{OnFlannel},
			Inject: usePrefix("overlayd.io"), Restore: usePrefix(flannelPrefix), Log: `lease written`,
		},
	}
	return in(Kubernetes, lossless(catchUp), rows)
}

// becomeFlannel makes of the lab one that flannel runs: only pods and their addresses stay.
func becomeFlannel(ctx context.Context, s *Site) error {
	for _, n := range s.Lab.Nodes() {
		if err := n.Stop(ctx); err != nil {
			return err
		}
		env, err := n.Run(ctx, "cat", n.SubnetFile())
		if err != nil {
			return err
		}
		_, errCleanup := n.Overlayd(ctx, "cleanup", "--state-dir", n.StateDir(), "--subnet-file", n.SubnetFile())
		_, errEnv := n.Shell(ctx, `rm -rf "$STATE_DIR"/*; printf '%s' "$ENV" > "$SUBNET_FILE"`, "ENV="+env,
			"STATE_DIR="+n.StateDir(), "SUBNET_FILE="+n.SubnetFile())
		api := s.Lab.APIServer()
		err = errors.Join(errCleanup, errEnv, api.Do(ctx, http.MethodDelete, lab.NodePath(n), "", nil), api.AddNode(ctx, n))
		if err != nil {
			return err
		}
	}
	for _, n := range s.Lab.Nodes() {
		d, err := startFlannel(ctx, s, n)
		if err != nil {
			return err
		}
		s.flannel = append(s.flannel, d)
	}
	s.Defer(func(context.Context, *Site) error { return s.stopFlannel(len(s.flannel)) })
	return Steps(Until(nothingLost, catchUp), func(context.Context, *Site) error { s.begin(); return nil })(ctx, s)
}

// stopFlannel ends the first so many that run.
func (s *Site) stopFlannel(n int) (err error) {
	for _, d := range s.flannel[:n] {
		err = errors.Join(err, d.stop())
	}
	s.flannel = s.flannel[n:]
	return err
}

// nothingLost holds when for half a second no packet was lost between any two pods.
func nothingLost(ctx context.Context, s *Site) error {
	from := time.Now()
	if err := sleep(ctx, 500*time.Millisecond); err != nil {
		return err
	}
	to := time.Now()
	_ = sleep(ctx, inFlight)
	l := s.traffic.between(from, to)
	return unless(l.Lost == 0, "%d packets lost, most from %s", l.Lost, l.Where)
}

// moveAll moves all nodes, one after the other, each in the order in which an operator is told to. Between pods of
// other nodes nothing is lost meanwhile, and afterwards between none.
func moveAll(ctx context.Context, s *Site) error {
	for _, n := range s.Lab.Nodes() {
		from := time.Now()
		if err := s.move(ctx, n); err != nil {
			return fmt.Errorf("move %s: %w", n.Name, err)
		}
		if err := s.noneElsewhere(ctx, from, n); err != nil {
			return fmt.Errorf("while %s is moved: %w", n.Name, err)
		}
		if _, err := s.await(ctx, All(nothingLost, podsAndNodes), time.Now(), catchUp); err != nil {
			return fmt.Errorf("after %s was moved: %w", n.Name, err)
		}
	}
	return nil
}

// podsAndNodes holds when each node's pod reaches all other nodes, and they reach it.
func podsAndNodes(ctx context.Context, s *Site) error {
	return s.everyNode(func(from *lab.Node) error {
		return s.everyNode(func(to *lab.Node) error {
			if from == to {
				return nil
			}
			return errors.Join(s.pingPod(ctx, from.Machine, to), s.everyFamily(func(f addr.Family) error {
				return reachesOne(ctx, from.Pods()[0], to.Name+" itself", to.Addr(f))
			}))
		})
	})
}

// usePrefix restarts all daemons, one after the other, with another --kube-annotation-prefix. With the first one, and
// with all, it waits for longer than a peer stays whose lease has gone.
func usePrefix(prefix string) Action {
	return func(ctx context.Context, s *Site) error {
		for i, n := range s.Lab.Nodes() {
			n.With("--kube-annotation-prefix", prefix)
			if err := errors.Join(n.Stop(ctx), n.Start()); err != nil {
				return err
			}
			ready, cancel := context.WithTimeout(ctx, catchUp)
			err := n.WaitReady(ready)
			cancel()
			if err == nil && (i == 0 || i == len(s.Lab.Nodes())-1) {
				err = sleep(ctx, letGo)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
}

func (s *Site) move(ctx context.Context, n *lab.Node) error {
	if err := errors.Join(s.stopFlannel(1), n.Start()); err != nil {
		return err
	}
	waits := func(ctx context.Context, _ *Site) error {
		_, text, err := n.Readyz(ctx)
		return errors.Join(err, unless(strings.Contains(text, "flannel.1"), "/readyz does not name the device: %s", text))
	}
	if _, err := s.await(ctx, waits, time.Now(), catchUp); err != nil {
		return err
	}
	ready, cancel := context.WithTimeout(ctx, catchUp)
	defer cancel()
	_, errDevices := n.Shell(ctx, `ip link delete flannel.1; ip link delete flannel-v6.1`)
	_, errRules := n.Shell(ctx, `for t in iptables ip6tables; do
		$t -w -t nat -D POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
		$t -w -t nat -F FLANNEL-POSTRTG; $t -w -t nat -X FLANNEL-POSTRTG
		$t -w -D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
		$t -w -F FLANNEL-FWD; $t -w -X FLANNEL-FWD
		done`)
	return errors.Join(errDevices, errRules, n.WaitReady(ready))
}

// noneElsewhere fails if since a moment packets were lost between others than a node. An answer may be late.
func (s *Site) noneElsewhere(ctx context.Context, from time.Time, n *lab.Node) error {
	to := time.Now()
	for {
		l := s.traffic.between(from, to, n)
		if time.Since(to) > inFlight && l.Elsewhere == 0 {
			return unless(len(l.Broken) == 0, "TCP connections broke: %q", l.Broken)
		}
		if time.Since(to) > lab.LateAnswer {
			return fmt.Errorf("%d packets lost between pods of other nodes", l.Elsewhere)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}
