package lab

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sync/errgroup"
)

// Status is how a lab is doing.
type Status struct {
	Lab   string       `json:"lab"`
	Title string       `json:"title"`
	Dir   string       `json:"dir"`
	Etcd  EtcdStatus   `json:"etcd"`
	Nodes []NodeStatus `json:"nodes"`
}

// EtcdStatus is how the lab's etcd is doing.
type EtcdStatus struct {
	PID  int      `json:"pid"` // 0: not running
	URLs []string `json:"urls"`
}

// NodeStatus is how a node's daemon is doing, and what it leased.
type NodeStatus struct {
	Name    string `json:"name"`
	NS      string `json:"namespace"`
	PID     int    `json:"pid"` // 0: not running
	Ready   bool   `json:"ready"`
	Problem string `json:"problem,omitempty"`
	Lease   *Lease `json:"lease,omitempty"`
	Log     string `json:"log"`
}

// Status asks every node.
func (l *Lab) Status(ctx context.Context) Status {
	s := Status{
		Lab: l.topology.Options.Name, Title: l.topology.title(), Dir: l.dir,
		Etcd:  EtcdStatus{PID: l.etcd.runningPID(), URLs: l.etcd.urls},
		Nodes: make([]NodeStatus, len(l.nodes)),
	}
	var g errgroup.Group
	for i, n := range l.nodes {
		g.Go(func() error {
			s.Nodes[i] = n.status(ctx)
			return nil
		})
	}
	_ = g.Wait() // problems are part of the status
	return s
}

func (p *Process) runningPID() int {
	if !p.Running() {
		return 0
	}
	return p.PID()
}

func (n *Node) status(ctx context.Context) NodeStatus {
	s := NodeStatus{Name: n.Name, NS: n.NS, PID: n.runningPID(), Log: n.Log()}
	if lease, err := n.Lease(); err == nil {
		s.Lease = &lease
	}
	if s.PID == 0 {
		s.Problem = "overlayd does not run"
		return s
	}
	if err := n.Ready(ctx); err != nil {
		s.Problem = err.Error()
		return s
	}
	s.Ready = true
	return s
}

// Text renders the status for a terminal.
func (s Status) Text() string {
	rows := [][]string{{"NODE", "NAMESPACE", "PID", "READY", "UNDERLAY", "SUBNET", "PODS"}}
	for _, n := range s.Nodes {
		rows = append(rows, n.row())
	}
	return fmt.Sprintf("Lab %s: %s\nFiles and logs: %s\netcd: pid %s, %s\n\n%s",
		s.Lab, s.Title, s.Dir, pidText(s.Etcd.PID), strings.Join(s.Etcd.URLs, " "), Table(rows, 2))
}

func (n NodeStatus) row() []string {
	ready := "yes"
	if !n.Ready {
		ready = "no: " + n.Problem
	}
	row := []string{n.Name, n.NS, pidText(n.PID), ready}
	if n.Lease == nil {
		return append(row, "-", "-", "-")
	}
	return append(row, join(n.Lease.Underlay), join(n.Lease.Subnets), strings.Join(n.Lease.Pods, " "))
}

func pidText(pid int) string {
	if pid == 0 {
		return "stopped"
	}
	return fmt.Sprint(pid)
}
