package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"time"
)

// answers measures how long an operator waits for an answer: whole commands, from their start to their end, and what is served over HTTP.
func (s *site) answers(ctx context.Context, d *daemon) error {
	add := func(name string, ask func() error) error {
		var took []float64
		for range pick(s.env, 7, 2) {
			began := time.Now()
			if err := ask(); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			took = append(took, millis(time.Since(began)))
		}
		s.env.Add(Row{Group: "answers", Name: peers(d.n) + ": " + name, Unit: Millis, Ours: took, Bound: AtMost(200)})
		return nil
	}
	for _, args := range [][]string{{"status"}, {"status", "--peers"}, {"status", "--peer", "node-77.example.org"}, {"diff"}} {
		name := "overlayd"
		for _, a := range args {
			name += " " + a
		}
		err := add(name, func() error {
			_, err := s.node.Run(ctx, s.env.Overlayd, append(args, "--socket", s.socket(), "--subnet-file", s.subnetFile())...)
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 1 && args[0] == "status" {
				return nil // it may have something to say of the node
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if err := s.examine(ctx, d); err != nil {
		return err
	}
	for _, path := range []string{"/", "/metrics", "/status", "/peers", "/readyz"} {
		err := add("GET "+path, func() error {
			resp, err := d.http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", sitePort, path))
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
				return fmt.Errorf("%s, %w", resp.Status, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// examine has the doctor examine the node. It also asks etcd and pings others, which takes as long as they do; how long it took for
// what it looks at by itself, it says.
func (s *site) examine(ctx context.Context, d *daemon) error {
	var local, all []float64
	for range pick(s.env, 5, 1) {
		out, err := s.node.Run(ctx, s.env.Overlayd, "doctor", "-o", "json", "--socket", s.socket(), "--subnet-file", s.subnetFile(), "--state-dir", s.stateDir())
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 1 {
			err = nil // it is no sound node
		}
		var report struct{ LocalNanoseconds, TookNanoseconds time.Duration }
		if err = errors.Join(err, json.Unmarshal([]byte(out), &report)); err != nil {
			return fmt.Errorf("overlayd doctor: %w", err)
		}
		local, all = append(local, millis(report.LocalNanoseconds)), append(all, millis(report.TookNanoseconds))
	}
	s.env.Add(Row{Group: "answers", Name: peers(d.n) + ": overlayd doctor, what it looks at on the node", Unit: Millis, Ours: local, Bound: AtMost(200)},
		Row{Group: "answers", Name: peers(d.n) + ": overlayd doctor, with etcd and pings", Unit: Millis, Ours: all})
	return nil
}
