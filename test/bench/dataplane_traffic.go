package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/overlayd/overlayd/test/lab"
)

const (
	iperfPort = 5201
	endPort   = 5202
)

// pathEnds are the programs at both ends of a path. The servers, and the client of the requests, run for as long as the benchmark
// does; iperf3's client is started for each sample.
type pathEnds struct {
	path
	core    string
	running []*exec.Cmd
	orders  io.Writer
	answers *bufio.Scanner
}

// startEnds starts the ends of all paths, and has sent a little over each of them when it returns.
func startEnds(ctx context.Context, paths []path) (all []*pathEnds, stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	stop = func() {
		cancel() // kills them
		for _, p := range all {
			for _, cmd := range p.running {
				_ = cmd.Wait()
			}
		}
	}
	core, err := lastCore()
	if err != nil {
		return nil, stop, err
	}
	for _, p := range paths {
		ends := &pathEnds{path: p, core: strconv.Itoa(core)}
		all = append(all, ends)
		if err := ends.start(ctx); err != nil {
			return all, stop, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return all, stop, nil
}

func (p *pathEnds) start(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := p.run(p.to, p.iperf(ctx, "-s", "-B", p.at.String())); err != nil {
		return err
	}
	end := func(which string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, self, EndCommand, which, netip.AddrPortFrom(p.at, endPort).String(), p.core)
		cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
		return cmd
	}
	if err := p.run(p.to, end(endServer)); err != nil {
		return err
	}
	client := end(endClient)
	orders, err := client.StdinPipe()
	if err != nil {
		return err
	}
	answers, err := client.StdoutPipe()
	if err != nil {
		return err
	}
	p.orders, p.answers = orders, bufio.NewScanner(answers)
	if err := p.run(p.from, client); err != nil {
		return err
	}
	return errors.Join(
		patiently(ctx, func() error { _, err := p.exchange(newConnection, 1); return err }),
		patiently(ctx, func() error { _, err := p.stream(ctx, 1); return err }))
}

// run starts a program on a machine.
func (p *pathEnds) run(on lab.Machine, cmd *exec.Cmd) error {
	if err := on.Do(cmd.Start); err != nil {
		return fmt.Errorf("on %s: %w", on.Name, err)
	}
	p.running = append(p.running, cmd)
	return nil
}

// iperf is iperf3 on the core, before most others there. A real-time class, as the other ends have, can lock the core up: iperf3 goes
// on while there is something to send, and the kernel's threads that carry it on are of the ordinary class.
func (p *pathEnds) iperf(ctx context.Context, args ...string) *exec.Cmd {
	argv := append([]string{"-c", p.core, "nice", "-n", "-20", "iperf3", "-p", strconv.Itoa(iperfPort)}, args...)
	return exec.CommandContext(ctx, "taskset", argv...)
}

// stream is the throughput of iperf3 with some connections at once, in Gbit/s.
func (p *pathEnds) stream(ctx context.Context, connections int) (float64, error) {
	cmd := p.iperf(ctx, "-J", "-c", p.at.String(), "-P", strconv.Itoa(connections), "-n", streamBytes, "-w", streamBuffer)
	out, err := p.from.Run(ctx, cmd.Path, cmd.Args[1:]...)
	if err != nil {
		return 0, err
	}
	return parseIperf(out)
}

// parseIperf reads what arrived, in Gbit/s.
func parseIperf(report string) (float64, error) {
	var r struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
		Error string
	}
	if err := json.Unmarshal([]byte(report), &r); err != nil {
		return 0, fmt.Errorf("read the report of iperf3: %w", err)
	}
	if r.Error != "" || r.End.Received.BitsPerSecond <= 0 {
		return 0, fmt.Errorf("iperf3 measured nothing: %s", r.Error)
	}
	return r.End.Received.BitsPerSecond / 1e9, nil
}

// exchange is what one of many exchanges takes, in µs.
func (p *pathEnds) exchange(x exchange, times int) (float64, error) {
	if _, err := fmt.Fprintln(p.orders, x, times); err != nil {
		return 0, err
	}
	if !p.answers.Scan() {
		return 0, fmt.Errorf("the client has ended: %w", errors.Join(p.answers.Err(), io.ErrUnexpectedEOF))
	}
	took, err := strconv.ParseInt(p.answers.Text(), 10, 64)
	if err != nil {
		return 0, errors.New(strings.TrimSpace(p.answers.Text()))
	}
	return float64(took) / float64(times) / float64(time.Microsecond), nil
}
