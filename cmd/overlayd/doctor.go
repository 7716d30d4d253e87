package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/agent"
	"github.com/overlayd/overlayd/backend/vxlan"
	"github.com/overlayd/overlayd/diag/doctor"
	"github.com/overlayd/overlayd/diag/status"
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
		Use: "doctor", Short: "Diagnose this node and print how to fix what is wrong", Args: noArgs,
		Long: `doctor checks the daemon, etcd, the kernel, the firewall and the path to the other nodes. It works with and without a
running daemon. Settings come from the running daemon; what it does not tell (secrets, TLS files), from flags, the environment and
the daemon's environment file, in this order. Exit status: 0 no check fails, 1 some do, 2 wrong usage.`,
		// Instead of that of all commands: wrong settings are a finding here.
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return d.read(cmd, f) },
		RunE:              func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context(), f, cmd.OutOrStdout()) },
	}
	own := pflag.NewFlagSet("doctor", pflag.ContinueOnError)
	own.BoolVar(&d.fix, "fix", false, "Apply the safe fixes (sysctls, files that keep other programs off), and check again")
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
	wrong := f.read(cmd)
	o := f.settings()
	o.Service = doctor.Service{Namespace: os.Getenv("POD_NAMESPACE"), Pod: os.Getenv("POD_NAME")} // as dist/kubernetes sets them
	o.UnknownKeys = unknownSettings(cmd.Root(), f.file.vars)
	o.ByDefault = len(f.ifaces)+len(f.ifaceRegexes) == 0 && f.ifaceCanReach == ""
	o.Forwards, o.ForwardFW = f.ipForward, f.forwardRules
	o.Wrong = errors.Join(wrong, f.wrong(o.IdentityErr))
	d.settings = o
	if d.output != "text" && d.output != "json" {
		return usageError{fmt.Errorf("-o: expected text or json, found %q", d.output)}
	}
	return nil
}

// wrong lists what the daemon would refuse, but for what is said elsewhere: who this node is, and how etcd is reached.
func (f flags) wrong(identity error) error {
	var errs []error
	if identity == nil {
		_, err := f.agentOptions()
		errs = append(errs, err)
	}
	_, err := f.storeOptions()
	errs = append(errs, err)
	_, err = f.firewallOptions()
	errs = append(errs, err)
	_, err = f.healthAddress()
	errs = append(errs, err)
	return errors.Join(errs...)
}

func (d *doctorFlags) run(ctx context.Context, f *flags, out io.Writer) error {
	o := doctor.Options{
		Settings: d.settings, Daemon: socketDaemon{client{f.socket}}, Ping: ping, Knock: knock, Choose: f.choose,
		Owned:  vxlan.Owns,
		Holder: holder, NotRunning: func(err error) bool { return errors.Is(err, errNotRunning) }, Privileges: needPrivileges(), Now: time.Now,
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
	return r.Print(out, doctor.Style{Colour: isTerminal(out), Problems: d.problems, Width: width(out)})
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

// width is that of the terminal; 0 where there is none.
func width(out io.Writer) int {
	f, ok := out.(*os.File)
	if !ok {
		return 0
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return int(size.Col)
}

// choose finds the interface as the daemon does.
func (f *flags) choose(h netstate.Host, c subnet.Config) (doctor.Underlay, error) {
	o, err := f.interfaceOptions()
	if err != nil {
		return doctor.Underlay{}, err
	}
	choice, err := agent.Choose(h, o, c, addr.Per[netip.Addr]{})
	if err != nil {
		return doctor.Underlay{}, err
	}
	return doctor.Underlay{By: choice.Underlay, PublicIP: choice.PublicIP, ByDefault: choice.ByDefault}, nil
}

// socketDaemon asks the daemon through its socket.
type socketDaemon struct{ c client }

func (d socketDaemon) Status(ctx context.Context) (n status.Node, err error) {
	err = d.c.ask(ctx, http.MethodGet, "/status", nil, &n)
	return n, err
}

func (d socketDaemon) Peers(ctx context.Context) (ps []status.Peer, err error) {
	err = d.c.ask(ctx, http.MethodGet, "/peers", nil, &ps)
	return ps, err
}

func (d socketDaemon) Diff(ctx context.Context) (lines []string, err error) {
	err = d.c.ask(ctx, http.MethodGet, "/diff", nil, &lines)
	return lines, err
}
