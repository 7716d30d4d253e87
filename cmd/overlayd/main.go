// Command overlayd is the daemon that joins a node to the overlay network, and the operator's commands to inspect it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log" //nolint:depguard // to silence it
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = "dev"

func main() { os.Exit(run()) }

// Exit statuses.
const (
	exitFailure = 1
	exitUsage   = 2 // something that the operator gave is wrong, or (status) the daemon does not run
)

func run() int {
	log.SetOutput(io.Discard)  // the netlink library's remarks on attributes that are newer than it
	logLibraries(zap.NewNop()) // a command says what failed; the daemon has a log
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	cmd := root()
	cmd.SetArgs(twoDashes(cmd, os.Args[1:]))
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if said := exitStatus(0); errors.As(err, &said) {
		return int(said)
	}
	for line := range strings.Lines(err.Error()) {
		line = "overlayd: " + strings.TrimSuffix(line, "\n") + "\n"
		if toJournal() {
			line = journalLines(zapcore.ErrorLevel, line)
		}
		fmt.Fprint(os.Stderr, line)
	}
	if errors.As(err, new(usageError)) {
		return exitUsage
	}
	return exitFailure
}

// usageError marks what the operator can fix by giving something else.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func root() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "overlayd",
		Short: "overlayd connects this node to the cluster's pod network",
		Long: `overlayd leases a pod subnet for this node, from etcd or from the Kubernetes API (--store), programs the path to
the subnets of all other nodes (VXLAN or direct routes), and masquerades traffic that leaves the pod network. Without a
subcommand it runs as the daemon.

Every flag can also be set from the environment: --etcd-endpoints is OVERLAYD_ETCD_ENDPOINTS. Flags marked [etcd] or
[kubernetes] are refused with another --store.`,
		Args:              noArgs,
		Version:           version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return f.read(cmd) },
		RunE:              func(cmd *cobra.Command, _ []string) error { return daemon(cmd.Context(), &f) },
	}
	cmd.SetFlagErrorFunc(wrongFlag)
	f.addStore(cmd.PersistentFlags())
	f.addNode(cmd.PersistentFlags())
	f.addDaemon(cmd.Flags())
	// Cobra's own would have the short form -v, which is another thing in flannel.
	cmd.Flags().Bool("version", false, "Print the version and exit")
	cmd.SetVersionTemplate("overlayd {{.Version}}\n")
	for _, c := range []*cobra.Command{
		statusCommand(&f), diffCommand(&f), logLevelCommand(&f), cleanupCommand(&f),
		wireGuardKeyCommand(&f),
	} {
		cmd.AddCommand(f.addEnvFile(c)) // it may say where the socket and the files are
	}
	cmd.AddCommand(leasesCommand(&f), doctorCommand(&f), versionCommand())
	cmd.CompletionOptions.DisableDefaultCmd = true
	return cmd
}

// twoDashes lets a flag have one dash only, as flannel's documentation writes some.
func twoDashes(cmd *cobra.Command, args []string) []string {
	out := slices.Clone(args)
	for i, a := range out {
		name, _, _ := strings.Cut(strings.TrimPrefix(a, "-"), "=")
		known := func(c *cobra.Command) bool {
			return c.Flags().Lookup(name) != nil || c.PersistentFlags().Lookup(name) != nil
		}
		if a == "--" {
			break
		}
		if strings.HasPrefix(a, "-") && len(name) > 1 && (known(cmd) || slices.ContainsFunc(cmd.Commands(), known)) {
			out[i] = "-" + a
		}
	}
	return out
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%q is not a command of overlayd; see overlayd --help", args[0])}
	}
	return nil
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "overlayd", version)
			return err
		},
	}
}
