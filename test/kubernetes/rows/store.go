package rows

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/overlayd/overlayd/test/kubernetes/cluster"
)

// status is what is needed of what overlayd says on a node.
type status struct {
	Started  time.Time
	Ready    bool
	Problems []struct{ Name, Reason string }
	Peers    struct{ Total, Tunnel, Direct int }
}

// status asks the daemon itself, and so needs no API server.
func (s *Suite) status(ctx context.Context, node string) (status, error) {
	var out status
	n, err := s.K.Node(node)
	if err != nil {
		return out, err
	}
	text, err := s.host(n.Host, n.Name).run(ctx, "get", "http://127.0.0.1:8471/status")
	if err != nil {
		return out, err
	}
	err = json.NewDecoder(strings.NewReader(text)).Decode(&out) // what follows is the client's address
	return out, wrap(err, "status of %s", node)
}

// until waits until the daemon of a node says what it should.
func (s *Suite) until(ctx context.Context, node, what string, says func(status) bool) error {
	return cluster.Poll(ctx, node+": "+what, func() error {
		got, err := s.status(ctx, node)
		if err == nil && !says(got) {
			err = fmt.Errorf("it says %+v", got)
		}
		return err
	})
}

// peers waits until n1 has so many peers.
func (s *Suite) peers(ctx context.Context, count int) error {
	return s.until(ctx, "n1", fmt.Sprintf("%d peers", count), func(got status) bool { return got.Peers.Total == count })
}

// restartAlone kills the daemon of n1 while etcd is away: the next one works from what is persisted.
func (s *Suite) restartAlone(ctx context.Context) error {
	const node = "n1"
	before, err := s.status(ctx, node)
	if err != nil {
		return err
	}
	const store = "overlay-etcd"
	s.K.StopControl(store)
	if err = s.kill(ctx, node); err == nil {
		err = s.until(ctx, node, "ready again, with its peers", func(got status) bool {
			return got.Started.After(before.Started) && got.Ready && got.Peers.Total == before.Peers.Total
		})
	}
	if err = errors.Join(err, s.K.StartControl(store)); err != nil {
		return err
	}
	return s.healthy(ctx)
}

// kill kills the daemon of a node. The kubelet starts it again.
func (s *Suite) kill(ctx context.Context, node string) error {
	n, err := s.K.Node(node)
	if err != nil {
		return err
	}
	_, err = n.Run(ctx, "pkill", "-KILL", "-x", "overlayd")
	return err
}
