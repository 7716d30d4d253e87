package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/overlayd/overlayd/test/lab"
)

// flags are what the user asked for on the command line.
type flags struct {
	lab    lab.Options
	output string
	keep   bool
}

func newRoot() *cobra.Command {
	f := &flags{}
	root := &cobra.Command{
		Use:           "overlay-lab",
		Short:         "A whole overlayd cluster on one machine, in network namespaces",
		SilenceErrors: true, SilenceUsage: true,
		Args:              noArgs, // an unknown command ends here
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return f.prepare(cmd) },
	}
	root.PersistentFlags().StringVar(&f.lab.Name, "name", "lab",
		"name of the lab; labs of different names do not touch each other")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(upCommand(f), downCommand(f), statusCommand(f), execCommand(f), checkCommand(f), demoCommand(f),
		faultsCommand(f), soakCommand(f), etcdCommand())
	return root
}

// prepare finds out before any work whether it can be done at all.
func (f *flags) prepare(cmd *cobra.Command) error {
	if f.output != "" && f.output != "json" && f.output != "text" {
		return usageError{fmt.Errorf("-o %q: want text or json", f.output)}
	}
	if os.Geteuid() != 0 && cmd.HasParent() && cmd.Name() != "help" && cmd.Parent().Name() != "completion" {
		return usageError{errors.New("it makes network namespaces: run it as root")}
	}
	return nil
}

func upCommand(f *flags) *cobra.Command {
	cmd := &cobra.Command{
		Use: "up", Short: "Bring a lab up and leave it running", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := f.up(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Print("\n" + l.Hints(os.Args[0]))
			return nil
		},
	}
	f.addLabFlags(cmd)
	return cmd
}

func (f *flags) addLabFlags(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.IntVar(&f.lab.Nodes, "nodes", 3, "number of nodes")
	fs.IntVar(&f.lab.Pods, "pods", 2, "number of pods on each node")
	fs.IntVar(&f.lab.Segments, "segments", 0, "underlay segments, 1 or 2 behind a router (default 2; 1 for host-gw)")
	fs.StringVar((*string)(&f.lab.Backend), "backend", string(lab.VXLAN), "vxlan, host-gw or wireguard")
	fs.BoolVar(&f.lab.Direct, "direct", false, "vxlan with DirectRouting")
	fs.StringVar((*string)(&f.lab.Stack), "stack", string(lab.StackIPv4), "ipv4, dual or ipv6")
	fs.StringVar(&f.lab.Overlayd, "overlayd", "", "path of overlayd (default: next to overlay-lab)")
}

// up brings the lab up. Interrupted, it removes it; where it fails otherwise, it stays for a look at the logs.
func (f *flags) up(ctx context.Context) (*lab.Lab, error) {
	start := time.Now()
	o := f.lab
	o.Progress = func(line string) { fmt.Fprintln(os.Stderr, line) }
	checked, err := o.Defaults()
	if err != nil {
		return nil, err
	}
	if err := checked.Validate(); err != nil {
		return nil, usageError{err}
	}
	l, err := lab.Up(ctx, checked)
	if err == nil {
		o.Progress(fmt.Sprintf("the lab is up after %s", time.Since(start).Round(10*time.Millisecond)))
		return l, nil
	}
	if ctx.Err() != nil {
		return nil, errors.Join(fmt.Errorf("interrupted: %w", err), remove(ctx, o.Name))
	}
	return nil, err
}

// remove takes the lab down, also when the context has ended, and says what is left where that is not all.
func remove(ctx context.Context, name string) error {
	if err := lab.Down(context.WithoutCancel(ctx), name); err != nil {
		return err
	}
	left, err := lab.Leftovers(name)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("lab %s left behind: %s", name, strings.Join(left, ", "))
	}
	return nil
}

func downCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Remove a lab, also one that crashed: processes, namespaces, files", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return remove(cmd.Context(), f.lab.Name) },
	}
}

func statusCommand(f *flags) *cobra.Command {
	cmd := &cobra.Command{
		Use: "status", Short: "Show how a lab's nodes are doing", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := lab.Open(f.lab.Name)
			if err != nil {
				return err
			}
			return f.print(os.Stdout, l.Status(cmd.Context()))
		},
	}
	f.addOutput(cmd)
	return cmd
}

func (f *flags) addOutput(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.output, "output", "o", "text", "text or json")
}

// print writes a document in the form that -o asks for.
func (f *flags) print(w io.Writer, doc interface{ Text() string }) error {
	if f.output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(doc)
	}
	_, err := io.WriteString(w, doc.Text())
	return err
}

func execCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:     "exec MACHINE -- COMMAND [ARG...]",
		Short:   "Run a command on a node, a pod, the router, the internet host or etcd",
		Example: "  overlay-lab exec n1 -- ip route\n  overlay-lab exec n1-p1 -- ping -c3 10.244.7.2",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usageError{errors.New("exec: want MACHINE -- COMMAND [ARG...]")}
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			l, err := lab.Open(f.lab.Name)
			if err != nil {
				return err
			}
			m, err := l.Machine(args[0])
			if err != nil {
				return err
			}
			return m.Exec(args[1:])
		},
	}
}

func checkCommand(f *flags) *cobra.Command {
	cmd := &cobra.Command{
		Use: "check", Short: "Check that everybody reaches everybody, as the Kubernetes network model asks", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := lab.Open(f.lab.Name)
			if err != nil {
				return err
			}
			return f.check(cmd.Context(), l)
		},
	}
	f.addOutput(cmd)
	return cmd
}

func (f *flags) check(ctx context.Context, l *lab.Lab) error {
	report, err := l.Check(ctx, lab.Settle)
	if err != nil {
		return err
	}
	if err := f.print(os.Stdout, report); err != nil {
		return err
	}
	if report.Failed > 0 {
		return errFailed
	}
	return nil
}

func demoCommand(f *flags) *cobra.Command {
	cmd := &cobra.Command{
		Use: "demo", Short: "Bring a lab up, check it, and take it down", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.demo(cmd.Context()) },
	}
	f.addLabFlags(cmd)
	f.addOutput(cmd)
	cmd.Flags().BoolVar(&f.keep, "keep", false, "leave the lab up and say how to look around")
	return cmd
}

func (f *flags) demo(ctx context.Context) error {
	l, err := f.up(ctx)
	if err == nil {
		fmt.Fprintln(os.Stderr, "checking the matrix")
		err = f.check(ctx, l)
	}
	if f.keep && ctx.Err() == nil {
		if l != nil {
			fmt.Fprint(os.Stderr, "\n"+l.Hints(os.Args[0]))
		}
		return err
	}
	return errors.Join(err, remove(ctx, f.lab.Name))
}

func etcdCommand() *cobra.Command {
	return &cobra.Command{
		Use: lab.EtcdCommand, Hidden: true, DisableFlagParsing: true,
		Run: func(_ *cobra.Command, args []string) { lab.EtcdMain(args) },
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s: unexpected argument %q", cmd.Name(), args[0])}
	}
	return nil
}
