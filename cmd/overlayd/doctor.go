package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent"
	"github.com/overlayd/overlayd/diag/doctor"
	"github.com/overlayd/overlayd/internal/ping"
	"github.com/overlayd/overlayd/netstate"
	"github.com/overlayd/overlayd/subnet"
)

// doctorFlags are how the doctor is asked.
type doctorFlags struct {
	fix      bool
	problems bool
	output   string

	settings doctor.Settings
}

func doctorCommand(f *flags) *cobra.Command {
	var d doctorFlags
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Diagnose this node and print how to fix what is wrong",
		Args:  noArgs,
		Long: `doctor checks the daemon, the store, the kernel, the firewall and the path to the other nodes. It works with
and without a running daemon. Settings come from the running daemon; what it does not tell (secrets, TLS files), from
flags, the environment and the daemon's environment file, in this order. Exit status: 0 no check fails, 1 some do,
2 wrong usage.`,
		// Instead of that of all commands: wrong settings are a finding here, but for flags that cannot be parsed.
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return d.read(cmd, f) },
		RunE:              func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context(), f, cmd.OutOrStdout()) },
	}
	own := pflag.NewFlagSet("doctor", pflag.ContinueOnError)
	own.BoolVar(
		&d.fix,
		"fix",
		false,
		"Apply the safe fixes (sysctls, files that keep other programs off), and check again",
	)
	own.BoolVar(&d.problems, "problems", false, "Show only findings that fail or warn")
	own.StringVarP(&d.output, "output", "o", "text", "Output format: text or json")
	cmd.Flags().AddFlagSet(own)
	// All that the daemon can be told is understood here too, so that one file serves both.
	daemon := pflag.NewFlagSet("daemon", pflag.ContinueOnError)
	f.addDaemon(daemon)
	daemon.VisitAll(func(x *pflag.Flag) { x.Hidden = true })
	cmd.Flags().AddFlagSet(daemon)
	return f.addEnvFile(cmd)
}

// read has wrong settings as findings.
func (d *doctorFlags) read(cmd *cobra.Command, f *flags) error {
	wrong := errors.Join(f.read(cmd), f.check(), f.checkStore(f.store.Kind))
	o := f.settings()
	o.Service = doctor.Service{
		Namespace: os.Getenv("POD_NAMESPACE"),
		Pod:       os.Getenv("POD_NAME"),
	} // as dist/kubernetes sets them
	o.UnknownKeys = unknownSettings(cmd.Root(), f.file.vars)
	o.ByDefault = !f.agent.Interface.Chosen()
	o.ForwardFW = f.agent.ForwardRules
	o.Wrong = wrong
	d.settings = o
	if d.output != "text" && d.output != "json" {
		return usageError{fmt.Errorf("-o: expected text or json, found %q", d.output)}
	}
	return nil
}

func (d *doctorFlags) run(ctx context.Context, f *flags, out io.Writer) error {
	o := doctor.Options{
		Settings:   d.settings,
		Ask:        client{f.socket}.get,
		Ping:       ping.Once,
		Choose:     f.choose,
		Owned:      agent.OwnsDevice,
		Holder:     holder,
		NotRunning: func(err error) bool { return errors.Is(err, errNotRunning) },
		Privileges: needPrivileges(),
		Now:        time.Now,
	}
	report := doctor.Run(ctx, o)
	var done []doctor.Done
	if d.fix {
		if done = doctor.Apply(report, "", f.sysctlDir); len(done) > 0 {
			report = doctor.Run(ctx, o)
		}
	}
	if err := d.print(out, report, done); err != nil {
		return err
	}
	if report.Count(doctor.Fail) > 0 {
		return exitStatus(exitFailure)
	}
	return nil
}

func (d *doctorFlags) print(out io.Writer, r doctor.Report, done []doctor.Done) error {
	if d.output == "json" {
		return printJSON(out, struct {
			doctor.Report
			Fixed []doctor.Done `json:"fixed,omitempty"`
		}{r, done})
	}
	for _, x := range done {
		line := "fixed: " + x.What
		if x.Err != "" {
			line = "not fixed: " + x.What + ": " + x.Err
		}
		_, _ = fmt.Fprintln(out, line)
	}
	if d.fix && len(done) == 0 {
		_, _ = fmt.Fprintln(out, "nothing to fix automatically")
	}
	return r.Print(out, doctor.Style{Colour: isTerminal(out), Problems: d.problems})
}

// holder says whether a daemon works on this node, whatever socket it has: by the name that it holds.
func holder() error {
	unlock, err := agent.Lock(lockName, 0)
	if err == nil {
		unlock()
	}
	if !errors.Is(err, agent.ErrRunning) {
		return nil
	}
	return err
}

// choose finds the interface as the daemon does.
func (f *flags) choose(h netstate.Host, c subnet.Config, n subnet.NodeSettings) (doctor.Underlay, error) {
	options, err := f.agent.Interface.With(n)
	if err != nil {
		return doctor.Underlay{}, err
	}
	choice, err := agent.Choose(h, options, c, addr.Per[netip.Addr]{})
	if err != nil {
		return doctor.Underlay{}, err
	}
	return doctor.Underlay{By: choice.Underlay, PublicIP: choice.PublicIP, ByDefault: choice.ByDefault}, nil
}
