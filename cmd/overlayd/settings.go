package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/diag/doctor"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
)

// defaultEnvFile is where the systemd unit has the daemon's settings, see dist/systemd.
const defaultEnvFile = "/etc/overlayd/overlayd.env"

// envFile is the file that systemd makes the daemon's environment of. Commands read it as well: their environment is
// another one.
type envFile struct {
	path string
	vars map[string]string // nil: there is none
	err  error
	// missed says that etcd would be looked for where it is not, since this user may not read the file.
	missed bool
}

// addEnvFile makes a command find the daemon's settings.
func (f *flags) addEnvFile(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&f.file.path, "env-file", defaultEnvFile,
		"Environment `file` of the daemon; optional")
	return cmd
}

// read puts the settings together: flags come before the environment, that before the file.
func (f *flags) read(cmd *cobra.Command) error {
	s := cmd.Flags()
	f.givenEndpoints, f.givenPrefix = s.Changed("etcd-endpoints"), s.Changed("etcd-prefix")
	f.unknown = unknownSettings(cmd.Root(), environment())
	if file := s.Lookup("env-file"); file != nil {
		if v, ok := os.LookupEnv(envName(file.Name)); ok && !file.Changed {
			f.file.path = v
		}
		f.file.vars, f.file.err = doctor.ReadEnvFile(f.file.path)
	}
	err := fromEnvironment(s, func(name string) (string, bool) {
		if v, ok := os.LookupEnv(name); ok {
			return v, true
		}
		v, ok := f.file.vars[name]
		return v, ok && isSetting(cmd.Root(), name)
	})
	f.file.missed = errors.Is(f.file.err, fs.ErrPermission) && !s.Changed("etcd-endpoints")
	return err
}

// isSetting reports whether a variable is one of the daemon's settings.
func isSetting(root *cobra.Command, name string) bool {
	found := false
	for _, s := range []*pflag.FlagSet{root.Flags(), root.PersistentFlags()} {
		s.VisitAll(func(x *pflag.Flag) { found = found || envName(x.Name) == name })
	}
	return found
}

func environment() map[string]string {
	out := map[string]string{}
	for _, v := range os.Environ() {
		name, value, _ := strings.Cut(v, "=")
		out[name] = value
	}
	return out
}

// unknownSettings are the variables that look like settings and are none: a slip, or of another version. They are
// warned about, not refused: with one file for all nodes, those whose overlayd is older would not start.
func unknownSettings(root *cobra.Command, vars map[string]string) []string {
	// Kubernetes gives such to pods for a Service whose name begins with ours.
	link := regexp.MustCompile(`_SERVICE_(HOST|PORT(_.*)?)=|_PORT=[a-z]+://|` +
		`_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=`)
	commands := append([]*cobra.Command{root}, root.Commands()...)
	var out []string
	for name, value := range vars {
		known := slices.ContainsFunc(commands, func(c *cobra.Command) bool { return isSetting(c, name) })
		if strings.HasPrefix(name, "OVERLAYD_") && !known && !link.MatchString(name+"="+value) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// settings are what doctor and all that need the store go by.
func (f *flags) settings() doctor.Settings {
	s := doctor.Settings{
		Store: f.store, GivenEndpoints: f.givenEndpoints, GivenPrefix: f.givenPrefix,
		EnvFile: f.file.path, EnvFileErr: f.file.err,
		GivenIdentity: f.nodeName != "" || f.nodeID != "" || f.file.vars != nil,
		SubnetFile:    f.subnetFile, StateDir: f.stateDir,
	}
	s.Identity, s.IdentityErr = f.identity()
	return s
}

// daemonSoon is how long a command waits for the daemon to say where the store is.
const daemonSoon = 3 * time.Second

// openStore finds the store as doctor does, and says who this node is, as far as that is known.
func (f *flags) openStore(ctx context.Context) (*etcd.Manager, subnet.Identity, error) {
	s := f.settings()
	ctx, cancel := context.WithTimeout(ctx, daemonSoon)
	defer cancel()
	var daemon *status.Node
	if n, err := (socketDaemon{client{f.socket}}).Status(ctx); err == nil {
		daemon, s.Identity = &n, subnet.Identity{NodeName: n.Name, NodeID: n.ID}
	} else if f.file.missed {
		return nil, s.Identity, usageError{fmt.Errorf("--env-file, --etcd-endpoints: %w", f.file.err)}
	}
	m, err := etcd.New(s.StoreOptions(daemon), zap.NewNop())
	if err != nil {
		return nil, s.Identity, usageError{err}
	}
	return m, s.Identity, nil
}
