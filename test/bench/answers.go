package bench

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// answers measures how long an operator waits for an answer: whole commands, from their start to their end, and what is
// served over HTTP.
func (s *site) answers(ctx context.Context, d *daemon) error {
	const doctor = "overlayd doctor"
	for _, name := range []string{
		"overlayd status", "overlayd status --peers", "overlayd status --peer node-77.example.org", "overlayd diff", doctor,
		"GET /", "GET /metrics", "GET /status", "GET /peers", "GET /readyz",
	} {
		args := strings.Fields(name)[1:]
		if name == doctor {
			args = append(args, "--state-dir", s.node.StateDir())
		}
		var took []float64
		for range pick(s.env, 7, 2) {
			began := time.Now()
			var err error
			if strings.HasPrefix(name, "GET ") {
				_, err = d.get(sitePort, args[0])
			} else {
				err = s.overlayd(ctx, args...)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			took = append(took, millis(time.Since(began)))
		}
		most := 200.0
		if name == doctor { // it also asks etcd and pings others
			most = 1000
		}
		s.env.Add(row("answers", name, Millis, took...).at(d.n).atMost(most))
	}
	return nil
}

// overlayd runs a command of the daemon. Exit status 1 is an answer, too: it has something to say of the node. But from
// diff it is an error: there is a difference.
func (s *site) overlayd(ctx context.Context, args ...string) error {
	args = append(args, "--socket", s.node.Socket(), "--subnet-file", s.node.SubnetFile())
	_, err := s.node.Run(ctx, s.env.Overlayd, args...)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 1 && args[0] != "diff" {
		err = nil
	}
	return err
}
