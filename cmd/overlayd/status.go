package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"

	"github.com/spf13/cobra"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/diag/status"
)

// exitStatus is how a command ends that has said all it has to say.
type exitStatus int

func (e exitStatus) Error() string { return "" }

// statusFlags are how the status is asked for.
type statusFlags struct {
	peers   bool
	peer    string
	explain bool
	output  string
}

func statusCommand(f *flags) *cobra.Command {
	var s statusFlags
	cmd := &cobra.Command{
		Use: "status", Short: "Show this node's lease, devices, peers, firewall and problems", Args: noArgs,
		Long: `status queries the daemon on this node. Exit status: 0 ready, 1 degraded or not ready, 2 the daemon is not
running.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.run(cmd.Context(), client{f.socket}, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&s.peers, "peers", false, "List the peers")
	cmd.Flags().StringVar(&s.peer, "peer", "", "Show one peer, by node `name`, ID, subnet, or any address in its subnet")
	cmd.Flags().BoolVar(&s.explain, "explain", false, "Show why the external interface was chosen")
	cmd.Flags().StringVarP(&s.output, "output", "o", "text", "Output format: text or json")
	return cmd
}

func (s statusFlags) run(ctx context.Context, c client, out io.Writer) error {
	if s.output != "text" && s.output != "json" {
		return usageError{fmt.Errorf("-o: expected text or json, found %q", s.output)}
	}
	style := status.Style{Colour: isTerminal(out)}
	if s.peers || s.peer != "" {
		return s.showPeers(ctx, c, out, style)
	}
	var n status.Node
	if err := c.ask(ctx, http.MethodGet, "/status", nil, &n); err != nil {
		return notRunning(err)
	}
	var err error
	switch {
	case s.output == "json":
		err = printJSON(out, n)
	case s.explain:
		_, err = fmt.Fprintf(out, "%s\npublic IP: %v, configured on this node: %v\n",
			n.Interface.Reason, n.Interface.PublicIPs, n.Interface.PublicIPLocal)
	default:
		err = n.Print(out, style)
	}
	if err == nil && n.ExitCode() != 0 {
		err = exitStatus(n.ExitCode())
	}
	return err
}

func (s statusFlags) showPeers(ctx context.Context, c client, out io.Writer, style status.Style) error {
	path := "/peers"
	if s.peer != "" {
		path = "/peer?name=" + url.QueryEscape(s.peer)
	}
	var peers []status.Peer
	if err := c.ask(ctx, http.MethodGet, path, nil, &peers); err != nil {
		return notRunning(err)
	}
	if s.peer != "" && len(peers) == 0 {
		return fmt.Errorf("no peer has the name, ID, subnet or address %q", s.peer)
	}
	if s.output == "json" {
		return printJSON(out, peers)
	}
	if s.peer == "" {
		return status.PrintPeers(out, peers, style)
	}
	for i, p := range peers {
		if i > 0 {
			_, _ = fmt.Fprintln(out)
		}
		if err := status.PrintPeer(out, p, style); err != nil {
			return err
		}
	}
	return nil
}

func diffCommand(f *flags) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "diff", Short: "Compare the kernel with the desired state", Args: noArgs,
		Long: `diff has the daemon compare the kernel with the desired state, and prints the missing changes. The daemon
applies them itself within a second; a change that is printed again and again is rejected by the kernel, or undone by
another process. Exit status: 0 no difference, 1 some, 2 the daemon is not running.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var lines []string
			if err := (client{f.socket}).ask(cmd.Context(), http.MethodGet, "/diff", nil, &lines); err != nil {
				return notRunning(err)
			}
			if output == "json" {
				if lines == nil {
					lines = []string{}
				}
				if err := printJSON(cmd.OutOrStdout(), lines); err != nil {
					return err
				}
			} else {
				for _, l := range lines {
					_, _ = fmt.Fprintln(cmd.OutOrStdout(), l)
				}
			}
			if len(lines) > 0 {
				return exitStatus(exitFailure)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "Output format: text or json")
	return cmd
}

func logLevelCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use: "log-level [LEVEL]", Short: "Show or set the log level of the running daemon", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			method, body := http.MethodGet, []byte(nil)
			if len(args) > 0 {
				level, err := zapcore.ParseLevel(args[0])
				if err != nil {
					return fmt.Errorf("%q is not a log level: expected debug, info, warn or error", args[0])
				}
				if body, err = json.Marshal(map[string]zapcore.Level{"level": level}); err != nil {
					return err
				}
				method = http.MethodPut
			}
			var answer struct{ Level string }
			if err := (client{f.socket}).ask(cmd.Context(), method, "/log-level", body, &answer); err != nil {
				return notRunning(err)
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), answer.Level)
			return err
		},
	}
}

// notRunning gives that case an exit status of its own.
func notRunning(err error) error {
	if errors.Is(err, errNotRunning) {
		return usageError{err}
	}
	return err
}

func printJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// isTerminal reports whether colours make sense; NO_COLOR (no-color.org) says that they do not.
func isTerminal(out io.Writer) bool {
	f, ok := out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
